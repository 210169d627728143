"""Numbers of graded answers, against what one counts by hand."""

from __future__ import annotations

import pytest

from megatron_flowrl.evaluation.summary import GradedAnswer, summarize_answers


def answer(prompt: int, reward: float, key: str | None = None, **changes: object) -> GradedAnswer:
    return GradedAnswer(prompt, reward, tokens=4, truncated=False, key=key, **changes)  # type: ignore[arg-type]


def test_by_hand() -> None:
    found = summarize_answers(
        [
            answer(0, 1.0, "1+2", num_solutions=4),
            answer(0, 1.0, "1+2", num_solutions=4),
            answer(0, 1.0, "2*2", num_solutions=4),
            answer(0, 0.5, "wrong", num_solutions=4),
            answer(1, 0.0, "a", num_solutions=5),
            answer(1, 0.0, "b", num_solutions=5),
            GradedAnswer(1, 0.0, tokens=10, truncated=True, failed=True, num_solutions=5),
            answer(1, 0.0, "c", num_solutions=5),
        ],
        correct_from=1.0,
    )
    assert found["reward_mean"] == pytest.approx(3.5 / 8)
    assert found["reward_std"] == pytest.approx((3.25 / 8 - (3.5 / 8) ** 2) ** 0.5)
    assert found["accuracy"] == 3 / 8
    assert found["solved"] == 0.5
    assert found["mixed_groups"] == 0.5
    assert found["distinct_correct"] == 1.0  # two of the first prompt, none of the second
    assert found["coverage"] == 0.25  # 2/4 and 0/5
    assert (found["length_mean"], found["length_max"]) == ((7 * 4 + 10) / 8, 10.0)
    assert found["truncated_share"] == found["ungraded_share"] == 1 / 8


def test_what_is_not_known_is_left_out() -> None:
    found = summarize_answers([answer(0, 1.0), answer(0, 0.0)], correct_from=0.5)
    assert "distinct_correct" not in found and "coverage" not in found
    assert found["accuracy"] == 0.5


def test_prompts_without_a_count_are_not_in_the_coverage() -> None:
    found = summarize_answers([answer(0, 1.0, "x", num_solutions=2), answer(1, 1.0, "y")], correct_from=1.0)
    assert found["coverage"] == 0.5 and found["distinct_correct"] == 1.0


def test_no_answers() -> None:
    assert summarize_answers([], correct_from=1.0) == {}
