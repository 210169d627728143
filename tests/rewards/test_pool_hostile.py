"""Items that hang, crash or eat memory cost themselves only; whatever happens to the pool, no process outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import TIME_LIMIT, GraderPool

from .conftest import BY_WORD, children_of, until, until_gone

ROOT = Path(__file__).parents[2]


def pool(timeout_seconds: float = 60.0, workers: int = 1) -> GraderPool:
    return GraderPool(RewardConfig(grader=BY_WORD, workers=workers, timeout_seconds=timeout_seconds, failed_score=-1.0))


def words(*responses: str) -> list[Item]:
    return [Item(response, None) for response in responses]


def make_batches_large(graders: GraderPool) -> None:
    """Items are sent together when grading is known to be quick."""
    graders.grade(words(*["score 0"] * 200))


@pytest.mark.parametrize("deed", ["hang", "hang_in_c"])
def test_the_time_limit_ends_a_process_and_others_are_unharmed(deed: str) -> None:
    with pool(timeout_seconds=1.0) as graders:
        make_batches_large(graders)
        began = time.monotonic()
        grades = graders.grade(words("score 1", "pid", deed, "pid", "score 2", deed, *["score 3"] * 20))
        took = time.monotonic() - began
        assert grades[0].score == 1.0 and grades[4].score == 2.0 and [grade.score for grade in grades[6:]] == [3.0] * 20
        assert grades[2] == grades[5] == Grade(-1.0, None, TIME_LIMIT)
        assert grades[1].key != grades[3].key
        assert graders.problems == {TIME_LIMIT: 2}
        assert 2.0 <= took < 60.0


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("exit", "crash: exit status 3"),
        ("segfault", "crash: ended by SIGSEGV"),
        ("kill", "crash: ended by SIGKILL"),
    ],
)
def test_a_crash_costs_one_item(deed: str, how: str) -> None:
    with pool(workers=2) as graders:
        make_batches_large(graders)
        grades = graders.grade(words("score 1", deed, "score 2", "score 3", deed, "score 4"))
        assert [grade.score for grade in grades] == [1.0, -1.0, 2.0, 3.0, -1.0, 4.0]
        assert [grade.problem for grade in grades if grade.problem] == [how, how]
        assert graders.problems == {"crash": 2}


def test_memory_is_limited_and_the_process_goes_on() -> None:
    with pool() as graders:
        before, memory, after = graders.grade(words("pid", "memory", "pid"))
        assert memory == Grade(-1.0, None, "MemoryError") and before == after


@pytest.mark.parametrize("then", ["hang", "exit"])
def test_what_a_grader_has_started_ends_with_its_process(then: str, tmp_path: Path) -> None:
    with pool(timeout_seconds=3.0) as graders:
        (grade,) = graders.grade([Item("family", None, row={"file": str(tmp_path / "family"), "then": then})])
        assert grade.problem in (TIME_LIMIT, "crash: exit status 3")
        until_gone(json.loads((tmp_path / "family").read_text()))
        assert graders.grade(words("score 1")) == [Grade(1.0)]


def test_kill_9_in_the_middle_costs_the_item_that_was_graded(tmp_path: Path) -> None:
    with pool() as graders:
        make_batches_large(graders)
        hanging = graders.submit(Item("family", None, row={"file": str(tmp_path / "family")}))
        others = [graders.submit(item) for item in words("score 1", "score 2")]
        until((tmp_path / "family").exists)
        os.kill(json.loads((tmp_path / "family").read_text())[0], signal.SIGKILL)
        assert hanging.result(60).problem == "crash: ended by SIGKILL"
        assert [future.result(60) for future in others] == [Grade(1.0), Grade(2.0)]


@pytest.mark.parametrize("which", ["process", "guard"])
def test_kill_9_of_an_idle_process_costs_nothing(which: str) -> None:
    with pool() as graders:
        (before,) = graders.grade(words("pid"))
        (guard,) = [one for one in children_of(os.getpid()) if int(before.key or 0) in children_of(one)]
        os.kill(guard if which == "guard" else int(before.key or 0), signal.SIGKILL)
        until_gone([int(before.key or 0), guard])
        (after,) = graders.grade(words("pid"))
        assert after.score == 1.0 and after.key != before.key and graders.problems == {}


PARENT = f"""
import os, signal, sys
from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.grader import Item
from megatron_flowrl.rewards.pool import GraderPool

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
graders = GraderPool(RewardConfig(grader={BY_WORD!r}, workers=2, timeout_seconds=600.0))
future = graders.submit(Item("family", None, row={{"file": sys.argv[1], "then": "hang_in_c"}}))
if sys.argv[2] == "leaves":
    while not os.path.exists(sys.argv[1]):
        pass
elif sys.argv[2] == "forked" and os.fork() == 0:  # holds the pool's sockets, as a process that writes a checkpoint does
    open(sys.argv[1] + ".fork", "w").write(str(os.getpid()))
    signal.pause()
else:
    future.result()
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGINT", "leaves", "forked"])
def test_processes_end_with_the_parent_however_it_ends(end: str, tmp_path: Path) -> None:
    family = tmp_path / "family"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, str(family), end]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as parent:
        try:
            until(family.exists)
            processes = json.loads(family.read_text())
            if end == "forked":
                until(lambda: (tmp_path / "family.fork").exists() and (tmp_path / "family.fork").read_text())
            elif end != "leaves":
                processes += [one for one in children_of(parent.pid) if one not in processes]
            if end != "leaves":
                parent.send_signal(signal.SIGKILL if end == "forked" else signal.Signals[end])
            parent.wait(60)
            until_gone(processes)
        finally:
            parent.kill()
            if (tmp_path / "family.fork").exists():
                os.kill(int((tmp_path / "family.fork").read_text()), signal.SIGKILL)
