"""Answers as text, and the terms that look at form alone."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_flowrl.config import RewardConfig, UserError
from megatron_flowrl.rewards.answer_match import normalized
from megatron_flowrl.rewards.find import check_ground_truth, make_grader, terms_of
from megatron_flowrl.rewards.grader import Grade, Item


def grade(grader: str, response: str, ground_truth: Any, finish_reason: str = "stop", **settings: Any) -> Grade:
    item = Item(response, ground_truth, finish_reason=finish_reason)
    return make_grader(RewardConfig(grader=grader, **settings))([item])[0]


@pytest.mark.parametrize(
    ("response", "truth", "score", "key"),
    [
        ("So it is\nAnswer:  Paris. \nThat is all.", "Paris", 1.0, "Paris"),
        ("<answer> Paris </answer> is it", "Paris", 1.0, "Paris"),
        ("It is\nParis\n", ["Lutetia", "Paris"], 1.0, "Paris"),
        ("New   York", "New York", 1.0, "New York"),
        ("paris", "Paris", 0.0, "paris"),
        ("7", 7, 1.0, "7"),
        ("Answer: Rome\nAnswer: Paris", "Rome", 0.0, "Paris"),
        ("", "Paris", 0.0, None),
        ("Answer:", "Paris", 0.0, None),
    ],
)
def test_exact(response: str, truth: Any, score: float, key: str | None) -> None:
    assert grade("exact", response, truth) == Grade(score, key)


@pytest.mark.parametrize(
    ("response", "score", "key"),
    [
        ("Answer: B", 1.0, "B"),
        ("The answer is clear.\nAnswer: (b) because", 1.0, "B"),
        ("**B.** It is so", 1.0, "B"),
        ("Therefore \\boxed{\\text{(B)}} and not C", 1.0, "B"),
        ("Answer: C", 0.0, "C"),
        ("Answer: Both", 0.0, None),
        ("I don't know", 0.0, None),
        ("This is a hard question.", 0.0, None),
        ("I think it is B", 1.0, "B"),
        ("b", 1.0, "B"),
        ("Answer: A good one", 0.0, None),
        ("Answer: A.", 0.0, "A"),
        ("", 0.0, None),
    ],
)
def test_choice(response: str, score: float, key: str | None) -> None:
    assert grade("choice", response, "B") == Grade(score, key)


def test_choice_wants_a_letter() -> None:
    assert check_ground_truth("choice", "(C)") is None
    assert "'Paris' is no letter; give A" in str(check_ground_truth("choice", "Paris"))


def test_regex() -> None:
    pattern = r"^#### *(-?\d+)"
    assert grade("regex", "2 + 2\n#### 5\nno:\n####  4", "4", pattern=pattern) == Grade(1.0, "4")
    assert grade("regex", "4", "4", pattern=pattern) == Grade(0.0)
    assert grade("regex", "so 12 and 4", 4, pattern=r"\d+") == Grade(1.0, "4")
    with pytest.raises(UserError, match=r"needs reward\.pattern: give a regular expression"):
        grade("regex", "", "4")
    with pytest.raises(UserError, match=r"reward\.pattern = '\(' is no regular expression: missing \)"):
        grade("regex", "", "4", pattern="(")


@pytest.mark.parametrize("truth", ["", None, [], ["a", ""], {"a": 1}, float("nan"), True])
def test_what_is_no_answer_is_refused_before_grading(truth: Any) -> None:
    for name in ("exact", "regex", "answer_match"):
        assert "is no answer; give text" in str(check_ground_truth(name, truth))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("$\\boxed{42}$", "42"),
        ("x = 3", "3"),
        ("\\text{Friday}.", "Friday"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\frac{a}{b}", "\\frac{a}{b}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        ("(1,234)", "(1,234)"),
        ("12 cm", "12"),
        ("12 cm^2", "12"),
        ("3^2", "3^2"),
        ("\\dfrac{\\sqrt{3}}{2}", "\\frac{\\sqrt{3}}{2}"),
        ("$18 dollars", "18"),
        ("90^\\circ", "90"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("50\\%", "50"),
        ("degrees", "degrees"),
    ],
)
def test_normalized(answer: str, text: str) -> None:
    assert normalized(answer) == text


def test_answer_match_knows_text_and_no_mathematics() -> None:
    assert grade("answer_match", "Thus\n**Answer: $\\dfrac{1}{2}$", "\\frac{1}{2}") == Grade(1.0, "\\frac{1}{2}")
    assert grade("answer_match", "answer: 0.5", "1/2").score == 0.0
    assert grade("answer_match", "It is \\boxed{7}", "7") == Grade(0.0)  # no mark
    assert grade("answer_match", "Answer: 7" + " " * 300, "7") == Grade(0.0)  # too far from the end


def test_format_and_overlong() -> None:
    tidy = r"(?s)<think>.*</think>\s*Answer: .+"
    assert grade("format", "<think>\nso\n</think>\nAnswer: 3", "3", format=tidy).score == 1.0
    assert grade("format", "Answer: 3", "3", format=tidy).score == 0.0
    assert grade("overlong", "x", None, "length").score == 1.0 and grade("overlong", "x", None).score == 0.0
    with pytest.raises(UserError, match=r"needs reward\.format"):
        grade("format", "", "3")


def test_a_weighted_sum() -> None:
    name = "exact + 0.25 * format - 0.5*overlong"
    assert terms_of(name) == [(1.0, "exact"), (0.25, "format"), (-0.5, "overlong")]
    assert terms_of(" - 2 * a.b + c ") == [(-2.0, "a.b"), (1.0, "c")]
    assert grade(name, "x", "x", "length", format=".") == Grade(0.75, "x")
    assert grade(name, "xx", "x", format=".") == Grade(0.0, "xx")
    assert "no answer" in str(check_ground_truth(name, None))


def test_a_problem_of_a_term_is_the_sums() -> None:
    (one,) = make_grader(RewardConfig(grader="exact + tests.rewards.graders.not_finite"))([Item("x", "x")])
    assert one.score == 0.0 and one.key == "x" and "is not a finite number" in str(one.problem)


@pytest.mark.parametrize(
    "name", ["exact +", "+ + exact", "exact * 2", "0.5 exact", "2 * 3 * exact", "exact + ", "*exact"]
)
def test_what_is_no_sum_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"reward\.grader = .*(is no term of a sum; give names|is none of math)"):
        make_grader(RewardConfig(grader=name))
