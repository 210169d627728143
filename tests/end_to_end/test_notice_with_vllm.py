"""Notice while answers are being sampled, and servers that are gone for good: the trainer saves what it has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_export_in_vllm import processes_with
from tests.tiny_tasks import SETTINGS, save_task
from tests.training.recorded import start_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def descendants(process: int) -> list[int]:
    """It and all that it has started, grown-up sessions too."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def start(task: Path, run: Path, **more: Any) -> subprocess.Popen[str]:
    settings: dict[str, Any] = SETTINGS | {
        "model.path": task / "model",
        "prompts.path": task / "train.jsonl",
        "run.folder": run,
        "run.steps": 50,
        "checkpoint.save_interval": 100,
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    given = [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in settings.items()]
    return start_run(["train", *given], 2, "--shutdown-timeout", "100")


def after_a_step(process: subprocess.Popen[str], run: Path, then: Callable[[], object]) -> tuple[int, str]:
    """Do something once the first step is recorded; the steps that are, when the run has ended, and its output."""
    metrics = run / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not metrics.exists() or not metrics.read_bytes().count(b"\n"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        then()
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return len(metrics.read_bytes().splitlines()), output


def test_notice_during_a_rollout(task_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(task_folder, run)

    def tell() -> None:
        for one in descendants(process.pid)[1:]:  # torchrun itself would end by it
            os.kill(one, signal.SIGUSR1)

    steps, output = after_a_step(process, run, tell)
    assert process.returncode == 0, output[-4000:]
    assert "the run is to end: what is being sampled is given up" in output
    assert steps == 1 and "ends after step 1 of 50, which is saved" in output
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{steps:08d}"
    assert processes_with(str(task_folder / "model")) == []


def test_where_no_server_is_left_what_was_trained_is_saved(task_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(task_folder, run, rollout__max_restarts=0)

    def end_servers() -> None:
        for one in processes_with(str(task_folder / "model")):
            if b"vllm" in Path(f"/proc/{one}/cmdline").read_bytes():
                os.kill(one, signal.SIGKILL)

    steps, output = after_a_step(process, run, end_servers)
    assert process.returncode != 0 and f"ends after step {steps} of 50, which is saved" in output, output[-4000:]
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{steps:08d}"
    assert processes_with(str(task_folder / "model")) == []


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Model and data."""
    return save_task(tmp_path / "task")
