"""Countdown: what is read as the answer, what is right, and how many right answers there are."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.answer import final_answer
from megatron_flowrl.rewards.countdown import count_solutions, enumerate_solutions
from megatron_flowrl.rewards.expression import NotAnExpression, parse_expression
from megatron_flowrl.rewards.find import check_ground_truth, make_grader
from megatron_flowrl.rewards.grader import Grade, Item

GRADER = make_grader(RewardConfig(grader="countdown"))
TRUTH = {"numbers": [3, 5, 7], "target": 56}


def grade(response: str, ground_truth: Any = TRUTH, row: dict[str, Any] | None = None) -> Grade:
    return GRADER([Item(response, ground_truth, row=row or {})])[0]


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("Let me see.\nAnswer: 1+2\nThat is all.", "1+2"),
        ("Answer: 1\nAnswer:\n\n  2 \n", "2"),
        ("<answer>Answer: 1+2</answer>", "1+2"),
        ("Answer: 1\n<answer>2</answer>", "1"),
        ("<answer>1</answer> or <answer>\n2\n</answer> ok", "2"),
        ("<answer>1</answer> then <answer>2", "1"),
        ("first\n 1+2 \n\n", "1+2"),
        ("1+2", "1+2"),
        ("</answer>3<answer>", "</answer>3<answer>"),
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_where_the_answer_is(response: str, text: str) -> None:
    assert final_answer(response) == text


@pytest.mark.parametrize(
    ("response", "score", "key"),
    [
        ("(3+5)*7", 1.0, "7*(3+5)"),
        ("I think.\nAnswer: 7 * (5 + 3)", 1.0, "7*(3+5)"),
        ("(3+5)*7 = 56", 1.0, "7*(3+5)"),
        ("(3+5)*7 = 112/2", 1.0, "7*(3+5)"),
        ("(3+5)*7 = 55", 0.0, "7*(3+5)"),
        ("(3+5)*7 =", 0.0, "7*(3+5)"),
        ("(3+5)*7 = 56 = 56", 0.0, "7*(3+5)"),
        ("(3+5)*7 = 56 or so", 0.0, "7*(3+5)"),
        ("(3+5)*7 = 56/0", 0.0, "7*(3+5)"),
        ("3+5*7", 0.0, "3+5*7"),
        ("56", 0.0, "56"),
        ("7*8", 0.0, "7*8"),
        ("(3+5)*7*7/7", 0.0, "7*7*(3+5)/7"),
        ("5+3", 0.0, "3+5"),
        ("56 = (3+5)*7", 0.0, "56"),
        ("(3+5)*7 is it", 0.0, None),
        ("", 0.0, None),
        ("-3", 0.0, None),
        ("7/(3-3)", 0.0, None),
        ("\0", 0.0, None),
    ],
)
def test_what_is_right(response: str, score: float, key: str | None) -> None:
    assert grade(response) == Grade(score, key)


def test_arithmetic_is_exact() -> None:
    assert grade("8/(3-8/3)", {"numbers": [3, 3, 8, 8], "target": 24}).score == 1.0
    large = 10**19
    assert grade(f"{large}-1", {"numbers": [1, large], "target": large}).score == 0.0
    assert grade("1/3", {"numbers": [1, 3], "target": 0}).score == 0.0


def test_a_number_that_is_given_twice_is_used_twice() -> None:
    truth = {"numbers": [2, 2, 3], "target": 12}
    assert grade("2*2*3", truth).score == 1.0
    assert grade("2*2*3", {"numbers": [2, 3], "target": 12}).score == 0.0
    assert grade("4*3", truth).score == 0.0


@pytest.mark.parametrize(
    ("ground_truth", "row"),
    [
        ('{"numbers": [3, 5, 7], "target": 56}', {}),
        ({"numbers": (3.0, 5, 7), "target": 56.0}, {}),
        ({"numbers": np.array([3, 5, 7]), "target": np.int64(56)}, {}),
        (None, {"numbers": [3, 5, 7], "target": 56}),
        ("56", {"numbers": [3, 5, 7], "target": 56}),
        (TRUTH, {"numbers": [1], "target": 1}),
    ],
)
def test_ground_truths_of_every_form(ground_truth: Any, row: dict[str, Any]) -> None:
    assert check_ground_truth("countdown", ground_truth, row) is None
    assert grade("(3+5)*7", ground_truth, row).score == 1.0


@pytest.mark.parametrize(
    ("ground_truth", "problem"),
    [
        (None, "None has no numbers and target; give {"),
        ("56", "'56' has no numbers"),
        ({"numbers": [1]}, "has no numbers and target"),
        ("{broken", "is no JSON"),
        ({"numbers": [], "target": 1}, "is no list of numbers"),
        ({"numbers": "123", "target": 1}, "is no list of numbers"),
        ({"numbers": 3, "target": 1}, "is no list of numbers"),
        ({"numbers": [1, "2"], "target": 1}, "numbers = '2' is no integer"),
        ({"numbers": [1, True], "target": 1}, "numbers = True is no integer"),
        ({"numbers": [1, -2], "target": 1}, "has a negative one"),
        ({"numbers": [1] * 65, "target": 1}, "at most 64"),
        ({"numbers": [1], "target": 0.5}, "target = 0.5 is no integer"),
        ({"numbers": [1], "target": float("nan")}, "target = nan is no integer"),
        ({"numbers": [1], "target": float("inf")}, "target = inf is no integer"),
        ({"numbers": [1], "target": None}, "target = None is no integer"),
    ],
)
def test_ground_truths_that_are_none(ground_truth: Any, problem: str) -> None:
    found = check_ground_truth("countdown", ground_truth)
    assert found is not None and problem in found
    with pytest.raises(ValueError, match=r"numbers|target|JSON"):
        grade("1", ground_truth)


def every_text(numbers: tuple[int, ...]) -> Iterator[str]:
    """All expressions over the numbers in this order, with all parentheses."""
    if len(numbers) == 1:
        yield str(numbers[0])
    for cut in range(1, len(numbers)):
        for left in every_text(numbers[:cut]):
            for right in every_text(numbers[cut:]):
                yield from (f"({left}{operator}{right})" for operator in "+-*/")


def by_hand(numbers: list[int], target: int) -> set[str]:
    """Right answers by writing down every text and grading it."""
    found = set()
    for order in set(permutations(numbers)):
        for text in every_text(order):
            try:
                expression, _ = parse_expression(text)
            except NotAnExpression:
                continue
            if expression.value == target:
                found.add(expression.key)
    return found


@pytest.mark.parametrize(
    ("numbers", "target", "keys"),
    [
        ([7], 7, {"7"}),
        ([7], 8, set()),
        ([2, 3], 6, {"2*3"}),
        ([3, 3, 8, 8], 24, {"8/(3-8/3)"}),
        ([1, 2, 3, 4], 24, {"1*2*3*4", "2*3*4/1", "4*(1+2+3)", "(1+3)*(2+4)"}),
        ([1, 1], 0, {"1-1"}),
        ([0, 5], 0, {"0*5", "0/5"}),
        ([1, 2], -1, {"1-2"}),
    ],
)
def test_solutions_that_are_known(numbers: list[int], target: int, keys: set[str]) -> None:
    assert enumerate_solutions(numbers, target) == keys and count_solutions(numbers, target) == len(keys)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(-5, 30))
def test_enumeration_finds_all_that_writing_down_finds(numbers: list[int], target: int) -> None:
    assert enumerate_solutions(numbers, target) == by_hand(numbers, target)


@pytest.mark.parametrize(("numbers", "target"), [([1, 2, 3, 4], 10), ([2, 2, 4, 8], 8), ([0, 1, 1, 5], 0)])
def test_enumeration_of_four_numbers(numbers: list[int], target: int) -> None:
    assert enumerate_solutions(numbers, target) == by_hand(numbers, target)


def test_the_grader_takes_every_solution() -> None:
    for key in enumerate_solutions([2, 3, 5, 7], 24):
        if not key.startswith("-"):
            assert grade(key, {"numbers": [7, 5, 3, 2], "target": 24}) == Grade(1.0, key)


def test_enumeration_refuses_what_the_grader_refuses() -> None:
    with pytest.raises(ValueError, match="negative"):
        count_solutions([1, -1], 2)
    with pytest.raises(ValueError, match="no list of numbers"):
        count_solutions([], 2)
    with pytest.raises(ValueError, match=r"target = 1/2 is no integer|target = Fraction"):
        count_solutions([1, 2], Fraction(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "response",
    [
        "(" * 10_000 + "3+5)*7",
        "Answer: " + "(" * 10_000 + "(3+5)*7" + ")" * 9_999,
        "9^{9^{9^9}}",
        "9**9**9**9",
        "{" * 3000,
        "1+" * 5_000_000,
        "x" * 10_000_000,
        "Answer:" * 1_000_000,
        "<answer>" * 1_000_000 + "</answer>" * 1_000_000,
        "(3+5)*7=" + "9" * 10_000_000,
        "\0" * 100_000,
        "\ud800(3+5)*7",
    ],
)
def test_hostile_responses_are_wrong(response: str) -> None:
    assert grade(response).score == 0.0


def test_deep_parentheses_are_right_where_they_are() -> None:
    assert grade("(" * 10_000 + "(3+5)*7" + ")" * 10_000) == Grade(1.0, "7*(3+5)")
