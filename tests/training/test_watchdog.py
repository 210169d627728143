"""A rank that hangs is named with where it stands, and the run ends."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.platform.distributed import World
from megatron_flowrl.training.watchdog import Watchdog, conclusion
from tests.distributed.ranks import run_module


@pytest.fixture
def watch(one_rank_platform: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """One whose thread does not run."""
    monkeypatch.setattr("threading.Thread.start", lambda _: None)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)
    return Watchdog(100.0, 480.0, 10.0, World(), tmp_path)


def test_no_progress(watch: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watch.step()
    watch.beat("update")
    assert watch.trouble(1400.0) is None  # the first step may take longer
    assert watch.trouble(1401.0) == "no progress for 401 s in the phase update"
    watch.done()
    watch.step()
    assert watch.trouble(1100.0) is None
    assert watch.trouble(1101.0) == "no progress for 101 s in the phase update"
    beats = watch.standing()["beats"]
    clock[0] = 1090.0
    watch.sign()
    assert watch.trouble(1190.0) is None and watch.trouble(1191.0) is not None
    assert watch.standing()["beats"] == beats  # micro-batches do not tell who is behind
    watch.sign(True)  # done, and waiting for others
    assert watch.trouble(1570.0) is None and watch.trouble(1571.0) is not None
    watch.sign()
    assert watch.trouble(1191.0) is not None
    clock[0] = 1100.0
    watch.beat()
    assert watch.trouble(1200.0) is None
    watch.done()
    assert watch.trouble(9999.0) is None  # what comes between steps has time limits of its own


def test_a_step_that_takes_ten_times_as_long(watch: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    for seconds in (20.0, 8.0, 9.0):
        watch.step()
        clock[0] += seconds
        watch.done()
    clock[0] += 500.0  # an evaluation is no part of a step
    assert watch.trouble(clock[0] - 400) is None
    watch.step()
    began = clock[0]
    for clock[0] in (began + 50, began + 90):
        watch.beat("generate")
        assert watch.trouble(clock[0]) is None
    clock[0] = began + 91
    watch.beat()
    assert watch.trouble(clock[0]) == "a step of 91 s, where the median is 9 s, in the phase generate"


def test_short_steps_are_never_too_slow(watch: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    for _ in range(5):
        watch.step()
        clock[0] += 0.1
        watch.done()
    watch.step()
    clock[0] += 59.0
    watch.beat()
    assert watch.trouble(clock[0]) is None


def standing(rank: int, collective: str | None, beats: int = 5) -> dict[str, Any]:
    about = {"rank": rank, "host": f"h{rank}", "what": "no progress", "beats": beats}
    return {**about, "collective": collective, "at": "x.py:1 (f)"}


def test_who_holds_the_others_up() -> None:
    lines = conclusion([standing(0, "all_reduce"), standing(1, None)], 2)
    assert lines == ["rank 1 on h1 waits for no other rank: no progress, at x.py:1 (f)"]
    silent = "rank 2 has written nothing: it, or its node, is gone or cannot run"
    assert conclusion([standing(0, "all_reduce"), standing(1, None)], 3) == [silent]  # the others may just be elsewhere
    lines = conclusion([standing(0, None, 7), standing(1, "all_reduce", 6)], 3)
    assert lines == [silent, "rank 1 on h1 is behind the others: no progress, at x.py:1 (f)"]
    lines = conclusion([standing(0, None, 7), standing(1, None, 6), standing(2, None, 7)], 3)  # as on GPUs
    assert lines == ["rank 1 on h1 is behind the others: no progress, at x.py:1 (f)"]
    lines = conclusion([standing(0, "all_reduce"), standing(1, "barrier")], 2)
    assert lines[0] == "rank 0 on h0 is in all_reduce: no progress, at x.py:1 (f)" and "for the network" in lines[-1]


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_rank_that_stands_still(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_module("tests.training.hang_worker", [str(tmp_path), "python"], 2, timeout=150)
    assert done.returncode != 0 and time.monotonic() - began < 120
    assert "no progress for 1" in done.stdout and "in the phase update" in done.stdout
    assert "rank 1 on " in done.stdout and "waits for no other rank" in done.stdout
    assert "rank 0 on " not in done.stdout.partition("waits for no other rank")[2]
    (word,) = tmp_path.glob("hang_*")
    found = {file.stem: json.loads(file.read_text()) for file in word.glob("*.json")}
    assert found["rank_0"]["collective"] == "all_reduce" and found["rank_1"]["collective"] is None
    assert "stands_still" in (word / "rank_1.txt").read_text() and "all_reduce" in (word / "rank_0.txt").read_text()


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_rank_that_is_stopped_between_steps(tmp_path: Path) -> None:
    done = run_module("tests.training.hang_worker", [str(tmp_path), "stopped"], 2, timeout=150)
    assert done.returncode != 0
    assert re.search(r"rank 0 on \S+: rank 1 on \S+ has given no sign of life for \d+ s", done.stdout)
    assert "rank 1 has written nothing: it, or its node, is gone or cannot run" in done.stdout
    assert "waits for no other rank" not in done.stdout  # rank 0 is not accused
    assert "stands_still" in next(tmp_path.glob("hang_*/rank_0.txt")).read_text()


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_rank_that_cannot_even_look(tmp_path: Path) -> None:
    done = run_module("tests.training.hang_worker", [str(tmp_path), "locked"], 2, timeout=150)
    assert done.returncode != 0
    assert "hang_worker.py" in next(tmp_path.glob("locked_*_rank_1.txt")).read_text()
