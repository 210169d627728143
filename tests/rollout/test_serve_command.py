"""`megatron-flowrl serve`: servers until a signal; with a program in vLLM's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from megatron_flowrl.cli import main
from tests.distributed.ranks import REPOSITORY
from tests.rollout.test_server import FAKE, is_alive, wait_for
from tests.tiny_models import save_model

pytestmark = pytest.mark.usefixtures("process_as_it_was")

# The command, with each server's program replaced: server number N runs in FOLDER/N, in the mode that follows.
_WITH_FAKES = """
import sys
import urllib.request
from pathlib import Path
from megatron_flowrl.cli import main
from megatron_flowrl.rollout.server import VllmServer
folder, modes, arguments = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]

def command(self):
    number = int(self.log.stem.partition("_")[2])
    place = folder / str(number)
    place.mkdir(exist_ok=True)
    return [sys.executable, %r, str(self.port), modes[number], str(place)]

VllmServer.command = command
main(["serve", *arguments])
""" % str(FAKE)  # noqa: UP031


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("model"))


def start(folder: Path, model: Path, modes: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WITH_FAKES, str(folder), modes, "--model", str(model), "--logs", str(folder / "logs"),
         f"rollout.servers={modes.count(',') + 1}", *arguments],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def processes(folder: Path) -> list[int]:
    return [process for file in folder.glob("*/processes") for process in json.loads(file.read_text())]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_servers_until_a_signal(tmp_path: Path, model: Path, how: signal.Signals) -> None:
    command = start(tmp_path, model, "normal,normal")
    assert command.stdout is not None
    urls = json.loads(command.stdout.readline())["urls"]
    assert len(set(urls)) == 2 and all(url.startswith("http://127.0.0.1:") for url in urls)
    assert len(processes(tmp_path)) == 4 and all(map(is_alive, processes(tmp_path)))
    command.send_signal(how)
    _, said = command.communicate(timeout=30)
    assert command.returncode == 0, said
    assert not any(map(is_alive, processes(tmp_path)))
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["server_0.log", "server_1.log"]


def test_one_that_does_not_start_ends_all(tmp_path: Path, model: Path) -> None:
    command = start(tmp_path, model, "normal,dies")
    said, errors = command.communicate(timeout=60)
    assert command.returncode == 2 and not said
    assert "ended before it was ready" in errors and "ValueError: no such model" in errors
    assert "Traceback" not in errors
    assert not any(map(is_alive, processes(tmp_path)))


def test_one_that_ends_by_itself_is_started_again_where_it_was(tmp_path: Path, model: Path) -> None:
    command = start(tmp_path, model, "normal,normal")
    assert command.stdout is not None
    urls = json.loads(command.stdout.readline())["urls"]
    victim, child = json.loads((tmp_path / "1" / "processes").read_text())
    shared = Path((tmp_path / "1" / "shared").read_text())
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: json.loads((tmp_path / "1" / "processes").read_text() or "[0]")[0] != victim)
    wait_for(lambda: not is_alive(child))

    def is_ready(url: str) -> bool:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
        except OSError:
            return False

    wait_for(lambda: is_ready(urls[1]))
    command.send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=30)
    assert command.returncode == 0 and "ended by itself and is started again" in errors
    shared.unlink(missing_ok=True)  # killed so soon after its start that its guard may not have seen the file
    assert not any(map(is_alive, processes(tmp_path)))


@pytest.mark.parametrize("mode", ["stuck", "stopped"])
def test_one_that_hangs_is_ended_and_started_again(mode: str, tmp_path: Path, model: Path) -> None:
    """Its engine makes no token though it has work, or it answers nothing; one that has nothing to do is left alone."""
    settings = ["rollout.hang_seconds=2", "rollout.start_timeout_seconds=3"]
    command = start(tmp_path, model, f"idle,{'stuck' if mode == 'stuck' else 'idle'}", *settings)
    assert command.stdout is not None
    command.stdout.readline()
    well, victim = (json.loads((tmp_path / n / "processes").read_text()) for n in "01")
    if mode == "stopped":
        os.kill(victim[0], signal.SIGSTOP)
    wait_for(lambda: json.loads((tmp_path / "1" / "processes").read_text() or "[0]")[0] != victim[0], 40)
    assert not any(map(is_alive, victim)) and all(map(is_alive, well))
    command.send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=60)
    assert "has made no token in 2 s though it was asked to (rollout.hang_seconds) and is started again" in errors


def test_one_that_ends_too_often_ends_all(tmp_path: Path, model: Path) -> None:
    command = start(tmp_path, model, "normal,normal", "rollout.max_restarts=0")
    assert command.stdout is not None
    command.stdout.readline()
    (victim, _) = json.loads((tmp_path / "1" / "processes").read_text())
    os.kill(victim, signal.SIGKILL)
    _, errors = command.communicate(timeout=30)
    assert command.returncode == 2 and "ended by itself" in errors
    # Killed so soon after its start that its guard may not have seen the file.
    Path((tmp_path / "1" / "shared").read_text()).unlink(missing_ok=True)
    wait_for(lambda: not any(map(is_alive, processes(tmp_path))))


def test_interrupted_while_starting(tmp_path: Path, model: Path) -> None:
    command = start(tmp_path, model, "silent")
    wait_for(lambda: (tmp_path / "0" / "processes").exists())
    command.send_signal(signal.SIGINT)
    said, errors = command.communicate(timeout=30)
    assert command.returncode == 0 and not said, errors
    assert not any(map(is_alive, processes(tmp_path)))


def test_what_cannot_be_served_is_named(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "hf-to-megatron", str(model), str(tmp_path / "run")])
    given = ["--model", str(model), "--logs", str(tmp_path / "logs")]
    for arguments, message in (
        (["--model", str(tmp_path / "run")], "is a checkpoint of this program; vLLM serves Hugging Face folders"),
        (["--model", str(tmp_path / "gone")], "gone' does not exist"),
        ([], "model.path is empty"),
        ([*given, "rollout.tensor_parallel_size=3"], "3 does not divide the model's num_attention_heads = 4"),
        ([*given, "rollout.max_model_len=513"], "rollout.max_model_len = 513 is above the model's limit of 512"),
        (
            [*given, "rollout.first_port=65535", "rollout.servers=2"],
            "leaves no port for the last of rollout.servers = 2",
        ),
        ([*given, "rollout.first_port=80"], "rollout.first_port"),
        ([*given, "rollout.host=192.0.2.1"], "rollout.host = '192.0.2.1', port 0: cannot listen there"),
        ([*given, "optimizer.lr=1"], "optimizer.lr"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["serve", *arguments])
        assert caught.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split()), arguments
    assert not (tmp_path / "logs").exists()


def test_for_training_it_takes_a_recipe_of_train_and_sends_no_weights(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of other sections are the trainer's, and a checkpoint will do: its configuration is all that is read."""
    made = []
    monkeypatch.setattr("megatron_flowrl.rollout.serve.serve", lambda servers, *_: made.extend(servers))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer: {lr: 1.0e-3}\nrollout: {dtype: float32}\n")
    given = [str(recipe), f"model.path={model}", f"run.folder={tmp_path}", "--logs", str(tmp_path / "logs")]
    main(["serve", "--for-training", *given])
    (server,) = made
    assert {"--load-format", "dummy"} <= {*server.command()} and "float32" in server.command()
    with pytest.raises(SystemExit):
        main(["serve", "--model", str(model), "optimizer.lr=1"])
