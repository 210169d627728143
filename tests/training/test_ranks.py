"""Ranks that hold the others up are named: a slow device, or a model replica that comes last."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_flowrl.platform import Platform
from megatron_flowrl.training.ranks import History, RankWait, Standing, Stragglers
from tests.distributed.ranks import run_worker

HOSTS = ["a", "a", "b", "b"]


def standings(probes: Sequence[float] = (1, 1, 1, 1), late: Sequence[float] = (0, 0, 0, 0)) -> list[Standing]:
    return [Standing(3.0, behind, probe) for probe, behind in zip(probes, late, strict=True)]


def test_a_slow_device_is_named_once_until_it_recovers() -> None:
    history = History(HOSTS, slow=1.3)
    slow = standings(probes=(1.0, 1.1, 1.4, 1.0))
    assert [history.add(slow, 10.0) for _ in range(4)] == [[]] * 4
    (line,) = history.add(slow, 10.0)
    assert line == (
        "straggler: rank 2 on b, 5 steps in a row: its own matrix products take 1.3 times the median: a slow device"
    )
    assert history.add(slow, 10.0) == []
    assert history.add(standings(), 10.0) == []
    assert [bool(history.add(slow, 10.0)) for _ in range(5)] == [False] * 4 + [True]


def test_a_late_replica_is_named() -> None:
    history = History(HOSTS, slow=1.3)
    late = standings(late=(-0.5, -0.5, 1.2, 1.2))
    said = [history.add(late, 10.0) for _ in range(6)]
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 2, 0]
    assert "rank 2 on b" in said[4][0] and "rank 3 on b" in said[4][1]
    assert "others wait 1.2 s of 10.0 s for its model replica" in said[4][0]


def test_what_differs_by_chance_is_not_named() -> None:
    history = History(HOSTS, slow=1.3)
    for step in range(40):
        probes = [2.0 if step % 4 == rank else 1.0 for rank in range(4)]
        late = [1.5 if step % 3 == rank else -0.1 for rank in range(4)]
        assert history.add(standings(probes, late), 10.0) == []


def test_one_rank_waits_for_nobody(one_rank_platform: Platform) -> None:
    heard = []
    wait = RankWait(one_rank_platform, heard.append)
    wait.micro_batch()
    wait.end()
    found = Stragglers(one_rank_platform).measure(wait)
    assert (
        heard == [False, True, False]
        and found["speed/slowest_device_factor"] == 1.0
        and found["speed/latest_rank_seconds"] == 0.0
    )
    assert found["speed/rank_wait_seconds"] == wait.seconds


@pytest.mark.distributed
def test_a_late_replica_is_measured_and_waiting_for_it_is_no_hang() -> None:
    output = run_worker("tests.training.ranks_worker", [], 2)
    assert output.count("straggler: rank 1 on ") == 1  # once, whoever else has found it
