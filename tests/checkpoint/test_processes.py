"""What forked writers leave for their parent, and that they end with it."""

from __future__ import annotations

import os
import queue
import signal
import time
from pathlib import Path

import pytest

from megatron_flowrl.checkpoint.processes import ResultQueue, die_with


def test_an_item_of_any_size_comes_back_once() -> None:
    results = ResultQueue()
    for item in ({0: ["a"] * 100_000}, ValueError("no")):
        child = os.fork()
        if not child:
            results.put(item)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert repr(results.get_nowait()) == repr(item)
        with pytest.raises(queue.Empty):
            results.get_nowait()


def test_an_item_that_was_cut_off_is_an_error() -> None:
    results = ResultQueue()
    results.put(["a"] * 1000)
    os.ftruncate(results._file.fileno(), 50)
    assert "what a writer said is cut off" in str(results.get_nowait())


def test_a_killed_parent_takes_its_children_and_theirs_along(tmp_path: Path) -> None:
    """Rank -> writer -> its own writers, as in Megatron-Core 0.16."""
    rank = os.fork()
    if not rank:
        os.setsid()
        parent = os.getpid()
        if not os.fork():
            die_with(parent)
            os.fork()
            (tmp_path / str(os.getpid())).touch()
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    while time.monotonic() < deadline:
        if all(_has_ended(int(path.name)) for path in tmp_path.iterdir()):
            return
        time.sleep(0.01)
    os.killpg(rank, signal.SIGKILL)
    pytest.fail("a writer outlives its rank")


def _has_ended(process: int) -> bool:
    """Gone, or dead and not yet collected by its new parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_whose_parent_has_ended_before_ends_too() -> None:
    child = os.fork()
    if not child:
        die_with(os.getppid() + 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
