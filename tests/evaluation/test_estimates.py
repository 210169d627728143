"""Averages, pass@k and majority votes against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from megatron_flowrl.evaluation.estimates import bootstrap_interval, majority, pass_at_k


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs have it
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)  # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
    assert pass_at_k(16, 0, 16) == 0.0 and pass_at_k(16, 1, 16) == 1.0 and pass_at_k(3, 2, 2) == 1.0


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, correct: int) -> None:
    for k in range(1, n + 1):
        subsets = [*combinations(range(n), k)]
        assert pass_at_k(n, correct, k) == pytest.approx(sum(min(s) < correct for s in subsets) / len(subsets))


@pytest.mark.parametrize("given", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_that_is_not_defined(given: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not defined"):
        pass_at_k(*given)


@pytest.mark.parametrize(
    ("keys", "correct", "value"),
    [
        (["7", "7", "8"], [True, True, False], 1.0),
        (["8", "7", "8"], [False, True, False], 0.0),
        (["7", "8"], [True, False], 0.5),
        (["7", None, None, None], [True, False, False, False], 1.0),
        ([None], [False], 0.0),
        ([], [], 0.0),
        (["1", "2", "3", "3", "2"], [False, True, False, False, True], 0.5),
    ],
)
def test_majority(keys: list[str | None], correct: list[bool], value: float) -> None:
    assert majority(keys, correct) == value


def test_bootstrap_interval() -> None:
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    low, high = bootstrap_interval([0.0, 1.0] * 50)
    # The mean of 100 draws of 0 or 1 has a deviation of 0.05: 95% lie within 1.96 of them.
    assert low == pytest.approx(0.5 - 0.098, abs=0.015) and high == pytest.approx(0.5 + 0.098, abs=0.015)
    assert bootstrap_interval([0.0, 1.0] * 50) == (low, high)
    assert all(map(math.isnan, bootstrap_interval([])))
