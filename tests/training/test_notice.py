"""A run that is given notice saves and ends in order; the same command ends in the weights of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_flowrl.config import SharedUserError
from megatron_flowrl.platform.distributed import World
from megatron_flowrl.rollout.errors import Interrupted
from megatron_flowrl.training.notice import Notice
from tests.tiny_tasks import save_task
from tests.training.recorded import arguments, metrics_of, start_run, write_records
from tests.training.test_restart import lines, state_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

STEPS = 6
SETTINGS: dict[str, Any] = {"run__steps": STEPS, "objective__preset": "exact", "checkpoint__save_interval": 100}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and records."""
    folder = save_task(tmp_path_factory.mktemp("task"))
    write_records(folder, folder / "records", STEPS)
    return folder


def start(task: Path, run: Path, *launcher: str) -> subprocess.Popen[str]:
    return start_run(arguments(task, task / "records", run, **SETTINGS), 2, *launcher)


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=200)
    return output


def ranks_of(agent: int) -> list[int]:
    """The workers of a torchrun, by their rank."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if (
                process.name.isdigit()
                and int(process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]) == agent
            ):
                environment = process.joinpath("environ").read_bytes().split(b"\0")
                rank = next((value for value in environment if value.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank[5:])] = int(process.name)
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


def after(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while lines(run) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def send(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        os.kill(process, number)


def test_one_rank_is_told_and_all_end_together(task: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert "ends after" not in ended(start(task, whole))
    process = start(task, cut)
    after(cut, 2, process)
    for _ in range(3):  # more often than once, as clusters do
        send(ranks_of(process.pid)[1:], signal.SIGUSR1)
    output = ended(process)
    assert process.returncode == 0, output[-4000:]
    step = len(metrics_of(cut))
    assert 2 <= step < STEPS
    assert "SIGUSR1: the run is saved and ends" in output
    assert f"ends after step {step} of {STEPS}, which is saved; the same command goes on from there" in output
    assert (cut / "checkpoints" / "latest").read_text().strip() == f"step_{step:08d}"
    process = start(task, cut)
    output = ended(process)
    assert process.returncode == 0 and f"steps {step + 1} to {STEPS}" in output
    expected, found = state_of(whole, tmp_path / "whole.pt"), state_of(cut, tmp_path / "cut.pt")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_ends_torchrun_ends_its_ranks_in_order(task: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher, which tells its ranks and gives them time."""
    run = tmp_path / "run"
    process = start(task, run, "--shutdown-timeout", "100")
    after(run, 1, process)
    process.send_signal(signal.SIGTERM)
    output = ended(process)
    step = len(metrics_of(run))
    assert f"ends after step {step} of {STEPS}" in output
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{step:08d}"


def test_ranks_whose_launcher_is_killed_save_and_end(task: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(task, run)
    after(run, 1, process)
    ranks = ranks_of(process.pid)
    process.kill()
    output = ended(process)  # the ranks have its standard output, too
    assert not any(Path(f"/proc/{rank}/maps").exists() and Path(f"/proc/{rank}/maps").read_text() for rank in ranks)
    step = len(metrics_of(run))
    assert step < STEPS and f"ends after step {step} of {STEPS}, which is saved" in output
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{step:08d}"


@pytest.mark.usefixtures("one_rank_platform")
def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Notice(World(), torch.device("cpu")) as notice:
        assert not notice.given() and not notice.everywhere()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert notice.given() and notice.everywhere() and notice.everywhere()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert issubclass(Interrupted, SharedUserError)  # a run's checkpoints are finished after it
