"""Notice while answers are being sampled: every process is told, as by a cluster; the trainer saves what it has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import REPOSITORY
from tests.end_to_end.test_export_in_vllm import processes_with
from tests.tiny_tasks import SETTINGS, save_task

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


def test_notice_during_a_rollout(task_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = SETTINGS | {
        "model.path": task_folder / "model",
        "prompts.path": task_folder / "train.jsonl",
        "run.folder": run,
        "run.steps": 50,
        "checkpoint.save_interval": 100,
    }
    given = [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in settings.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, "--shutdown-timeout", "100", "-m", "megatron_flowrl", "train", *given],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not metrics.exists() or not metrics.read_bytes().count(b"\n"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for one in descendants(process.pid)[1:]:  # torchrun itself would end by it
            os.kill(one, signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    steps = len(metrics.read_bytes().splitlines())
    assert process.returncode == 0, output[-4000:]
    assert f"ended after step {steps} of 50, as was asked" in output
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{steps:08d}"
    assert processes_with(str(task_folder / "model")) == []


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Model and data."""
    return save_task(tmp_path / "task")
