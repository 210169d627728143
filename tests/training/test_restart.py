"""Runs that are killed and started again by the same command end as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.tiny_tasks import save_task
from tests.training.recorded import arguments, metrics_of, start_run, write_records

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

STEPS = 6
SETTINGS: dict[str, Any] = {
    "run__steps": STEPS,
    "objective__preset": "exact",
    "optimizer__lr_decay_style": "cosine",
    "optimizer__lr_decay_iters": STEPS,
    "optimizer__lr_warmup_iters": 2,
    "checkpoint__save_interval": 2,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and records."""
    folder = save_task(tmp_path_factory.mktemp("task"))
    write_records(folder, folder / "records", STEPS)
    return folder


def start(task: Path, run: Path, ranks: int) -> subprocess.Popen[str]:
    return start_run(arguments(task, task / "records", run, **SETTINGS), ranks)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-5000:]
    return output


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_when(process: subprocess.Popen[str], condition: Any, number: signal.Signals = signal.SIGKILL) -> None:
    """All processes of a run at once, as soon as something is so."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)


def state_of(run: Path, out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint, the optimizer's state too."""
    dcp_to_torch_save(run / "checkpoints" / f"step_{step:08d}", out)
    found = torch.load(out, weights_only=False)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_started_again(ranks: int, task: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(task, whole, ranks))

    kill_when(start(task, cut, ranks), lambda: lines(cut) >= 1)  # before the first checkpoint
    kill_when(start(task, cut, ranks), lambda: lines(cut) >= 3)  # after it, with a step that will be done again
    kill_when(start(task, cut, ranks), lambda: lines(cut) >= 5)  # while the checkpoint of step 4 is being written
    finish(start(task, cut, ranks))

    expected, found = state_of(whole, tmp_path / "whole.pt"), state_of(cut, tmp_path / "cut.pt")
    assert len(expected) > 20 and list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [line["step"] for line in metrics_of(cut)] == list(range(1, STEPS + 1))
    for line, other in zip(metrics_of(cut), metrics_of(whole), strict=True):
        assert {name: line[name] for name in line if name.startswith(("update/", "rollout/"))} == {
            name: other[name] for name in other if name.startswith(("update/", "rollout/"))
        }
    events = EventAccumulator(str(cut / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("update/loss")] == list(range(1, STEPS + 1))
    left = {path.name for path in cut.rglob("*") if "partial" in path.name or path.name.startswith(".w")}
    assert not left


def test_a_finished_run_has_nothing_to_do(task: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(start(task, run, 1))
    before = (run / "metrics.jsonl").read_bytes()
    assert "nothing is left to do" in finish(start(task, run, 1))
    assert (run / "metrics.jsonl").read_bytes() == before
