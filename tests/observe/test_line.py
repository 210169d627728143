"""The line of a step: aligned whatever the numbers are."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flowrl.observe.line import COLUMNS, SECONDS, duration, number, step_line

ALL = (*COLUMNS, SECONDS)


def places(line: str) -> dict[str, int]:
    """Where each label begins."""
    labels = (*COLUMNS.values(), "eta", " s")
    found = ((label, re.search(rf"(?<!\S){re.escape(label)}(?= )", f"{line} ")) for label in labels)
    return {label: match.start() for label, match in found if match}


def test_a_line_reads_like_this() -> None:
    scalars = {"rollout/reward_mean": 0.4312, "rollout/length_mean": 14.24, "update/lr": 1e-6, "time/step": 3.2}
    line = step_line(12, 200, scalars | {"rollout/else": 5.0}, seconds_left=250)
    assert line == "step  12/200  reward   0.431  len    14.2  lr  1.0e-6     3.20 s  eta   4 min"


@given(st.lists(st.dictionaries(st.sampled_from(ALL), st.floats()), min_size=2, max_size=5))
def test_columns_stay_where_they_are(steps: list[dict[str, float]]) -> None:
    known = {name for scalars in steps for name in scalars}
    lines = [step_line(place, 1000, scalars, known, 10.0**place) for place, scalars in enumerate(steps)]
    assert len({len(line) for line in lines}) == 1
    whole = places(step_line(999, 1000, dict.fromkeys(known, 1.0), seconds_left=1))
    for line in lines:
        assert places(line).items() <= whole.items()


def test_what_a_run_never_has_takes_no_room() -> None:
    first, second = {"update/loss": 1.0, "update/lr": 1.0}, {"update/lr": 2.0}
    known = first.keys() | second.keys()
    lines = [step_line(1, 9, first, known), step_line(2, 9, second, known)]
    assert lines == ["step 1/9  loss    1.00  lr    1.00", "step 2/9                lr    2.00"]
    assert step_line(3, 9, second) == "step 3/9  lr    2.00"
    assert step_line(3, 9, {}) == "step 3/9"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (-0.0, "0"), (1, "1.00"), (0.431, "0.431"), (-0.0123, "-0.0123"), (14.2, "14.2"), (123456, "123456"),
        (9.996, "10.00"), (1e9, "1.0e9"), (-1.24e-5, "-1.2e-5"), (-1e-100, "-1e-100"), (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == f"{text:>7}"


@given(st.floats())
def test_every_number_is_as_wide(value: float) -> None:
    text = number(value)
    assert len(text) == 7
    if 1e-300 < abs(value) < 1e300:
        assert math.isclose(float(text), value, rel_tol=0.5 if "e" in text else 0.06)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45, "45 s"), (240, "4 min"), (9000, "2.5 h"), (40000, "11 h"), (1e6, "12 d"), (math.inf, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == f"{text:>7}"
