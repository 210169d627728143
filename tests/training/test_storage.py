"""A disk that is full, or gone, for a while: training goes on, says so, and keeps the checkpoints it has."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.checkpoint.manifest import problem_with, read_manifest
from tests.distributed.ranks import REPOSITORY
from tests.tiny_tasks import save_task
from tests.training.recorded import arguments, metrics_of, write_records
from tests.training.test_restart import state_of

STEPS = 60
SETTINGS: dict[str, Any] = {"run__steps": STEPS, "checkpoint__save_interval": 5, "tracking__tensorboard": False}


def can_mount() -> bool:
    """Whether this process may have file systems of its own."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-m", "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_mount(), reason="mounting a disk of its own needs unshare and the right to"),
]


class OwnDisk:
    """A run in whose eyes its folder is a disk of so many MiB; `at` leads there from outside."""

    def __init__(self, task: Path, folder: Path, mebibytes: int) -> None:
        self._task, self._folder, self._log = task, folder, folder.with_suffix(".log")
        folder.mkdir()
        mount = f'mount -t tmpfs -o size={mebibytes}m tmpfs "{folder}" && exec sleep 1000'
        self._holder = subprocess.Popen(["unshare", "-m", "sh", "-c", mount])
        self.at = Path(f"/proc/{self._holder.pid}/root{folder}")
        wait_for(lambda: self._inside("mountpoint", "-q", str(folder)).returncode == 0)

    def start(self, **settings: Any) -> subprocess.Popen[bytes]:
        """`megatron-flowrl train`."""
        given = arguments(self._task, self._task / "records", self._folder, **SETTINGS | settings)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with self._log.open("ab") as log:
            command = [*self._enter(), sys.executable, "-m", "megatron_flowrl", *given]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=REPOSITORY)

    def lose(self) -> None:
        """In its place there is an empty disk that takes nothing."""
        done = self._inside("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(self._folder))
        assert done.returncode == 0, done.stderr

    def find(self) -> None:
        """The disk is there again, as it was."""
        done = self._inside("umount", str(self._folder))
        assert done.returncode == 0, done.stderr

    def said(self) -> str:
        """What its runs have printed."""
        return self._log.read_text() if self._log.exists() else ""

    def close(self) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self._holder.pid), "-m", f"--wd={REPOSITORY}"]

    def _inside(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*self._enter(), *command], capture_output=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and records."""
    folder = save_task(tmp_path_factory.mktemp("task"))
    write_records(folder, folder / "records", STEPS)
    return folder


@pytest.fixture(scope="module")
def expected(task: Path) -> dict[str, torch.Tensor]:
    """The last state of a run on a sound disk."""
    given = arguments(task, task / "records", task / "whole", **SETTINGS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-m", "megatron_flowrl", *given], env=environment, check=True, cwd=REPOSITORY)
    return state_of(task / "whole", task / "whole.pt", STEPS)


@pytest.fixture
def disk(task: Path, tmp_path: Path) -> Iterator[OwnDisk]:
    """Of 48 MiB: a few checkpoints."""
    own = OwnDisk(task, tmp_path / "run", 48)
    yield own
    own.close()


def assert_ends_the_same(disk: OwnDisk, expected: dict[str, torch.Tensor], out: Path) -> None:
    found = state_of(disk.at, out, STEPS)
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_disk_that_is_full_for_a_while(disk: OwnDisk, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run = disk.start()
    checkpoints = CheckpointFolder(disk.at / "checkpoints")
    wait_for(lambda: bool(checkpoints.steps()), run)
    fill(disk.at / "other")
    wait_for(lambda: "the run's last checkpoint is tried again for 300 s; make room" in disk.said(), run)
    assert "metrics.jsonl cannot be written: No space left on device; training goes on" in disk.said()
    assert "the checkpoint of step 30 could not be written" in disk.said()
    assert checkpoints.steps() == [5] and f"step {STEPS}/{STEPS}" in disk.said()
    (disk.at / "other").unlink()
    assert run.wait(100) == 0, disk.said()[-3000:]
    assert_ends_the_same(disk, expected, tmp_path / "state.pt")


def test_a_disk_that_is_lost(disk: OwnDisk, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """To its end: the run says what it could not keep, and the same command goes on from the last checkpoint."""
    run = disk.start(checkpoint__last_save_seconds=2)
    checkpoints = CheckpointFolder(disk.at / "checkpoints")
    wait_for(lambda: bool(checkpoints.steps()), run)
    disk.lose()
    status = run.wait(200)
    assert status == 2 and "cannot be written: Read-only file system; training goes on" in disk.said(), disk.said()[
        -3000:
    ]
    assert f"the checkpoint of step {STEPS}, the last of this run, could not be written" in disk.said()
    disk.find()
    for step in checkpoints.steps():
        manifest = read_manifest(checkpoints.path_of(step))
        assert not any(problem_with(checkpoints.path_of(step), name, record) for name, record in manifest.files.items())
    newest = checkpoints.steps()[-1]
    assert newest < STEPS
    assert disk.start().wait(200) == 0
    assert f"steps {newest + 1} to {STEPS}" in disk.said()
    assert_ends_the_same(disk, expected, tmp_path / "state.pt")
    assert [line["step"] for line in metrics_of(disk.at)] == [*range(1, STEPS + 1)]


def fill(file: Path) -> None:
    """All that the disk has left."""
    with file.open("wb", buffering=0) as content:
        try:
            while True:
                content.write(b"x" * 2**16)
        except OSError:
            return
