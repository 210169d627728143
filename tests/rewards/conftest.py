"""What the tests of rewards share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.pool import GraderPool

BY_WORD = "tests.rewards.graders.by_word"


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition, and fail where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(process: int) -> bool:
    """Whether a process runs; one that is only not collected yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until_gone(processes: Iterable[int]) -> None:
    for process in processes:
        until(lambda process=process: not alive(process))  # type: ignore[misc]


def children_of(process: int) -> list[int]:
    """Living processes that descend from one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == process and state != "Z":
            found += [int(stat.parent.name), *children_of(int(stat.parent.name))]
    return found


@pytest.fixture(scope="module")
def math_pool() -> Iterable[GraderPool]:
    with GraderPool(RewardConfig(grader="math", workers=1, timeout_seconds=20.0)) as pool:
        yield pool
