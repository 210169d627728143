"""Servers start, say why they do not, and leave nothing behind, however they or their parent end."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.config import RolloutConfig, UserError, load_config
from megatron_flowrl.rollout import server as server_module
from megatron_flowrl.rollout.guard import session_members
from megatron_flowrl.rollout.serve import make_servers
from megatron_flowrl.rollout.server import ServerError, VllmServer, hold_port, server_environment
from tests.distributed.ranks import REPOSITORY
from tests.tiny_models import save_model

FAKE = Path(__file__).parent / "fake_server.py"
SETTINGS = RolloutConfig(start_timeout_seconds=30.0)


class FakeServer(VllmServer):
    """As VllmServer, with another program behind the guard."""

    def __init__(self, folder: Path, mode: str = "normal", settings: RolloutConfig = SETTINGS) -> None:
        super().__init__(settings, folder / "model", folder / "logs" / "server.log")
        self.folder, self.mode = folder, mode

    def command(self) -> list[str]:
        return [sys.executable, str(FAKE), str(self.port), self.mode, str(self.folder)]

    def processes(self) -> list[int]:
        wait_for(lambda: (self.folder / "processes").exists())
        found: list[int] = json.loads((self.folder / "processes").read_text())
        return found

    def assert_nothing_is_left(self) -> None:
        assert [process for process in self.processes() if is_alive(process)] == []
        for name in ("shared", "temporary"):
            assert not Path((self.folder / name).read_text()).exists()


def wait_for(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[..., FakeServer]]:
    """Makes fake servers, and ends them."""
    made: list[FakeServer] = []

    def make(mode: str = "normal", settings: RolloutConfig = SETTINGS) -> FakeServer:
        made.append(FakeServer(tmp_path, mode, settings))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def test_a_server_becomes_ready_and_leaves_nothing(fake: Any) -> None:
    server = fake()
    server.start()
    server.wait_until_ready()
    assert server.is_running() and server.is_ready()
    assert all(is_alive(process) for process in server.processes())
    assert Path((server.folder / "shared").read_text()).exists()
    server.stop()
    server.stop()
    assert not server.is_running() and not server.is_ready()
    server.assert_nothing_is_left()


def test_a_server_that_ignores_being_asked_is_killed(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.3)
    server = fake("stubborn")
    server.start()
    server.wait_until_ready()
    server.stop()
    server.assert_nothing_is_left()


def test_a_server_that_crashes_leaves_nothing(fake: Any) -> None:
    server = fake()
    server.start()
    server.wait_until_ready()
    time.sleep(1.0)  # the guard has looked at it meanwhile
    with pytest.raises(OSError):
        server.get("/crash", timeout=5.0)
    wait_for(lambda: not server.is_running())
    server.assert_nothing_is_left()


@pytest.mark.parametrize("mode", ["normal", "stubborn"])
def test_a_guard_that_is_killed(mode: str, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.5)
    server = fake(mode)
    server.start()
    server.wait_until_ready()
    time.sleep(1.0)  # the guard has looked at it meanwhile
    front_end, shared = server.processes()[0], Path((server.folder / "shared").read_text())
    os.kill(int(Path(f"/proc/{front_end}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    wait_for(lambda: not server.is_running())
    if mode == "normal":
        wait_for(lambda: not is_alive(front_end))  # the kernel has told it
    server.start_again()
    assert not is_alive(front_end) and not shared.exists()
    server.stop()
    server.assert_nothing_is_left()


def test_the_end_of_the_log_says_why_a_server_did_not_start(fake: Any) -> None:
    server = fake("dies")
    server.start()
    with pytest.raises(ServerError) as caught:
        server.wait_until_ready()
    message = str(caught.value)
    assert "ended before it was ready (ValueError: no such model); the end of" in message
    assert server.url in message and str(server.model) in message and str(server.log) in message


def test_the_first_error_is_said_though_others_follow(fake: Any) -> None:
    """vLLM's log ends with what its front end makes of the failure of a worker."""
    server = fake()
    server.log.parent.mkdir()
    root = "ValueError: Available memory is less than requested memory for kv (100000.0 GiB)."
    server.log.write_text(
        f"(Worker pid=2) ERROR 11-25 05:34:22 [multiproc_executor.py:1063] {root}\n"
        + '(APIServer pid=1)   File "x.py", line 1\n' * 400
        + "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert f"ended ({root}); the end of" in str(server.failure("ended"))


def test_a_server_that_is_never_ready_is_ended(fake: Any) -> None:
    server = fake("silent", RolloutConfig(start_timeout_seconds=1.0))
    server.start()
    with pytest.raises(ServerError, match=r"was not ready after rollout\.start_timeout_seconds = 1; the end of"):
        server.wait_until_ready()
    server.assert_nothing_is_left()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_parent_that_ends_takes_its_server_along(tmp_path: Path, how: signal.Signals) -> None:
    """Killed, asked to end, or interrupted from the keyboard."""
    code = (
        "import signal, sys; from pathlib import Path; from tests.rollout.test_server import FakeServer;"
        # A shell starts what it puts in the background with interrupts ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "server = FakeServer(Path(sys.argv[1])); server.start(); server.wait_until_ready(); print(flush=True);"
        "__import__('time').sleep(1000)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    server = FakeServer(tmp_path)
    assert all(is_alive(process) for process in server.processes())
    parent.send_signal(how)
    parent.wait()
    wait_for(lambda: not any(is_alive(process) for process in server.processes()))
    for name in ("shared", "temporary"):
        wait_for(lambda name=name: not Path((tmp_path / name).read_text()).exists())  # type: ignore[misc]


def test_the_environment_of_a_trainer_stays_with_it(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "0",
        "ROLE_NAME": "default", "MASTER_ADDR": "x", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "y",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    server = fake()
    server.start()
    server.wait_until_ready()
    found = json.loads((server.folder / "environment").read_text())
    assert not theirs.keys() & found.keys()
    assert found["SOMETHING_ELSE"] == "kept" and found["VLLM_SERVER_DEV_MODE"] == "1"
    assert server_environment({}, RolloutConfig(cpu_kv_cache_gib=7))["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_a_reply_that_is_not_json_is_an_error(fake: Any) -> None:
    server = fake()
    server.start()
    server.wait_until_ready()
    with pytest.raises(OSError, match=r"/odd did not answer JSON"):
        server.get("/odd", timeout=5.0)
    with pytest.raises(OSError, match="404"):
        server.get("/gone", timeout=5.0)


def test_a_port_in_use_and_a_host_of_others_are_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port}: cannot listen there .*Address already in use"):
            hold_port("127.0.0.1", port)
    with pytest.raises(ServerError, match=r"rollout\.host = '192\.0\.2\.1', port 0: cannot listen there"):
        hold_port("192.0.2.1")


def test_nobody_else_is_given_the_port_of_a_server_that_does_not_listen_yet(fake: Any) -> None:
    server = fake()
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("127.0.0.1", server.port))
    server.start()
    server.wait_until_ready()  # and it can listen there all the same
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("127.0.0.1", server.port))
    server.stop()
    hold_port("127.0.0.1", server.port).close()


def test_vllm_that_is_missing_is_named(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ServerError, match=r"vLLM cannot be imported: pip install --no-deps -r requirements/vllm\.txt"):
        fake().start()


def test_a_program_that_cannot_be_started_is_in_the_log(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = fake()
    monkeypatch.setattr(server, "command", lambda: ["/no/such/program"])
    server.start()
    with pytest.raises(ServerError, match="cannot start /no/such/program: No such file or directory"):
        server.wait_until_ready()


def test_settings_reach_the_command_line(tmp_path: Path) -> None:
    settings = RolloutConfig(
        tensor_parallel_size=2, dtype="float32", max_model_len=128, extra_arguments=("--enforce-eager",)
    )
    command = VllmServer(settings, tmp_path / "model", tmp_path / "log", port=4321).command()
    pairs = dict(itertools.pairwise(command))
    assert pairs["--tensor-parallel-size"] == "2" and pairs["--dtype"] == "float32"
    assert pairs["--max-model-len"] == "128" and pairs["--port"] == "4321"
    assert pairs["--model"] == str(tmp_path / "model") and command[-1] == "--enforce-eager"


def test_quantization_reaches_the_command_line_under_a_name_that_vllm_has(tmp_path: Path) -> None:
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    known = (Path(vllm.origin).parent / "model_executor" / "layers" / "quantization" / "__init__.py").read_text()
    for name in ("fp8_per_tensor", "fp8_per_block"):
        server = VllmServer(RolloutConfig(quantization=name), tmp_path / "model", tmp_path / "log", port=4321)
        assert dict(itertools.pairwise(server.command()))["--quantization"] == name and f'"{name}"' in known
    assert "--quantization" not in VllmServer(RolloutConfig(), tmp_path, tmp_path / "log", port=4321).command()


def test_quantization_is_refused_without_gpus(tmp_path: Path) -> None:
    config = load_config(None, [f"model.path={tmp_path}", "rollout.quantization=fp8_per_block"])
    with pytest.raises(UserError, match=r"rollout\.quantization = fp8_per_block needs GPUs"):
        make_servers(config, save_model("qwen2", tmp_path), tmp_path / "logs")


def test_members_of_a_session() -> None:
    assert os.getpid() in session_members(os.getsid(0))
