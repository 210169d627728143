"""Seconds of phases, by a clock that only moves when it is told to."""

from __future__ import annotations

import pytest

from megatron_flowrl.observe import timers
from megatron_flowrl.observe.timers import Timers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timers, "time", clock)
    return clock


def test_phases_add_up(clock: Clock) -> None:
    timed = Timers()
    for seconds in (1.0, 2.0):
        with timed("generate"):
            clock.now += seconds
        clock.now += 0.5
    with timed("update"):
        clock.now += 4.0
    assert timed.seconds() == {"generate": 3.0, "update": 4.0} and timed.elapsed() == 8.0


def test_a_second_counts_for_the_innermost_phase_only(clock: Clock) -> None:
    timed = Timers()
    with timed("update"):
        clock.now += 1.0
        with timed("wait"):
            clock.now += 2.0
            with timed("update"):
                clock.now += 4.0
        clock.now += 8.0
    assert timed.seconds() == {"update": 13.0, "wait": 2.0}
    assert sum(timed.seconds().values()) == timed.elapsed()


def test_a_step_begins_anew(clock: Clock) -> None:
    timed = Timers()
    with timed("evaluation"):
        clock.now += 1.0
    timed.reset()
    assert timed.seconds() == {} and timed.elapsed() == 0
    with timed("generate"):
        clock.now += 1.0
        timed.reset()
        clock.now += 2.0
        assert timed.seconds() == {"generate": 2.0}
        clock.now += 4.0
    assert timed.seconds() == {"generate": 6.0} and timed.elapsed() == 6.0


def test_what_was_measured_elsewhere_is_added(clock: Clock) -> None:
    timed = Timers()
    timed.add("wait", 0.5)
    timed.add("wait", 0.25)
    with timed("wait"):
        clock.now += 1.0
    assert timed.seconds() == {"wait": 1.75}


def test_a_phase_that_fails_is_measured_and_over(clock: Clock) -> None:
    timed = Timers()
    with pytest.raises(ValueError, match="no"), timed("update"):
        clock.now += 1.0
        raise ValueError("no")
    clock.now += 5.0
    assert timed.seconds() == {"update": 1.0}


def test_the_device_is_waited_for_where_phases_begin_and_end(clock: Clock) -> None:
    """What a device still has to do counts for the phase that has asked for it."""
    queued = [3.0]

    def synchronize() -> None:
        clock.now += queued.pop() if queued else 0.0

    timed = Timers(synchronize)
    assert queued == [3.0]
    with timed("first"):  # work from before it is not its own
        queued.append(1.0)
        with timed("second"):
            queued.append(7.0)
    assert timed.seconds() == {"first": 1.0, "second": 7.0}
