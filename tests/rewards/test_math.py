"""Mathematics by math-verify, as it runs in a pool."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.find import check_ground_truth
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import TIME_LIMIT, GraderPool

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("So it is \\boxed{\\frac{14}{3}}.", "\\frac{14}{3}"),
        ("The answer is $\\frac{14}{3}$.", "14/3"),
        ("14/3", "$\\frac{14}{3}$"),
        ("#### 1,000", "1000"),
        ("It makes 18", 18),
        ("\\boxed{0.5}", "\\frac12"),
        ("\\boxed{(3, \\frac{\\pi}{2})}", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("\\boxed{x^2+2x+1}", "(x+1)^2"),
        ("First \\boxed{3}. No: it is \\boxed{4}", "4"),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
        ("\\boxed{[-2,7]}", "x \\in [-2,7]"),
        ("\\boxed{7}", "so \\boxed{7}"),
    ],
)
def test_equal_answers_are_right(response: str, gold: Any, math_pool: GraderPool) -> None:
    (grade,) = math_pool.grade([Item(response, gold)])
    assert grade.score == 1.0 and grade.problem is None and grade.key


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("\\boxed{\\frac{14}{5}}", "\\frac{14}{3}"),
        ("\\boxed{4}, \\boxed{5}", "5"),
        ("\\boxed{5}. No: it is \\boxed{4}", "5"),
        ("", "5"),
        ("I do not know.", "5"),
        ("\\boxed{}", "5"),
        ("\\boxed{\\frac{1}{2", "5"),
        ("$\\left( \\frac{", "5"),
        ("\0\0\0", "5"),
    ],
)
def test_other_answers_are_wrong(response: str, gold: str, math_pool: GraderPool) -> None:
    (grade,) = math_pool.grade([Item(response, gold)])
    assert grade.score == 0.0 and grade.problem is None


@pytest.mark.parametrize(
    ("responses", "key"),
    [
        (["\\boxed{\\frac{1}{2}}", "It is $1/2$.", "\\boxed{0.5}", "\\boxed{\\frac{2}{4}}", "\\boxed{0.50}"], "1/2"),
        (["\\boxed{1,000}", "1000", "\\boxed{ 1000 }"], "1000"),
        (["\\boxed{x + 1}", "so $x+1$"], "x+1"),
        (["", "nothing"], None),
    ],
)
def test_the_key_is_one_for_one_answer(responses: list[str], key: str | None, math_pool: GraderPool) -> None:
    assert {grade.key for grade in math_pool.grade([Item(response, "7") for response in responses])} == {key}


@pytest.mark.parametrize("gold", [None, "", " ", True, float("nan"), [], {"answer": 1}])
def test_ground_truths_that_are_none(gold: Any, math_pool: GraderPool) -> None:
    problem = check_ground_truth("math", gold)
    assert problem is not None and "is no answer; give text, or a number" in problem
    (grade,) = math_pool.grade([Item("1", gold)])
    assert grade.problem == f"ValueError: {problem}"


@pytest.mark.parametrize(
    ("said", "gold", "score"),
    [
        ("40_9", "40_9", 1.0),
        ("40_{9}", "40_9", 1.0),
        ("40", "40_9", 0.0),
        ("40_9", "40", 0.0),
        ("40_8", "40_9", 0.0),
    ],
)
def test_a_base_is_part_of_a_number(said: str, gold: str, score: float, math_pool: GraderPool) -> None:
    (grade,) = math_pool.grade([Item(f"\\boxed{{{said}}}", gold)])
    assert (grade.score, grade.problem) == (score, None)


@pytest.mark.parametrize("gold", ["5", "\\frac12", 5, 0.5])
def test_ground_truths_that_are_good(gold: Any) -> None:
    assert check_ground_truth("math", gold) is None


HOSTILE = [
    "\\boxed{9^{9^{9^9}}}",
    "$9^{9^{9^9}}$ and $2^{10^{10}}$",
    "9**9**9**9",
    "\\boxed{" * 3000,
    "\\boxed{" + "{" * 3000 + "1" + "}" * 3000 + "}",
    "$" + "(" * 10_000 + "$",
    "\\boxed{\\frac{1}{" * 2000,
    "$\\sqrt{" * 5000,
    "x" * 10_000_000,
    "\\boxed{5}" * 1_000_000,
    "\0" * 10_000_000,
    "\\boxed{" + "9" * 40_000 + "}",
    "\\boxed{10000000000!}",
    "\\boxed{\\int_0^1 x^{x^{x^x}} dx}",
]


def test_hostile_answers_cost_at_most_the_time_limit() -> None:
    items = [item for response in HOSTILE for item in (Item(response, "6"), Item("\\boxed{6}", "6"))]
    with GraderPool(RewardConfig(grader="math", workers=2, timeout_seconds=2.0)) as pool:
        grades = pool.grade(items)
        assert pool.grade([Item("\\boxed{6}", "6")] * 2) == [Grade(1.0, "6")] * 2
    assert [grade.score for grade in grades[::2]] == [0.0] * len(HOSTILE)
    assert grades[1::2] == [Grade(1.0, "6")] * len(HOSTILE)
    assert grades[0].problem == TIME_LIMIT
