"""Tasks of reasoning-gym, scored by themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.find import check_ground_truth, make_grader
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import GraderPool
from megatron_flowrl.rewards.reasoning_gym import final_answer

reasoning_gym = pytest.importorskip("reasoning_gym")

ENTRY = {
    "question": "Is 7 prime?",
    "answer": "292",
    "metadata": {"source_dataset": "leg_counting", "total_legs": 292},
}


def grade(response: str, ground_truth: Any, row: dict[str, Any] | None = None) -> Grade:
    return make_grader(RewardConfig(grader="reasoning_gym"))([Item(response, ground_truth, row=row or {})])[0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Well.\n<answer>\na b\nc\n</answer>", "a b\nc"),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        ("Answer: 1\n2 ", "1\n2"),
        ("<answer>1</answer> Answer: 2", "1"),
        ("  292\n", "292"),
    ],
)
def test_where_the_answer_is(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("ground_truth", "row"),
    [
        ({"dataset": "leg_counting", "entry": ENTRY}, {}),
        (json.dumps({"dataset": "leg_counting", "entry": ENTRY}), {}),
        ({"entry": json.dumps(ENTRY)}, {}),
        (ENTRY, {}),
        ("292", ENTRY),
        (None, {**ENTRY, "metadata": json.dumps(ENTRY["metadata"])}),
        (None, {"dataset": "leg_counting", "entry": ENTRY, "other": 1}),
        (None, {"dataset": "leg_counting", "answer": "292", "metadata": {}}),
    ],
)
def test_ground_truths_of_every_form(ground_truth: Any, row: dict[str, Any]) -> None:
    assert check_ground_truth("reasoning_gym", ground_truth, row) is None
    assert grade("<answer>292</answer>", ground_truth, row) == Grade(1.0, "292")
    assert grade("<answer>7</answer>", ground_truth, row).score < 1.0


@pytest.mark.parametrize(
    ("ground_truth", "row", "problem"),
    [
        (None, {}, r"the row's columns \(none\) have no entry"),
        ("292", {"answer": "292"}, r"columns \(answer\) have no entry"),
        ({"dataset": "leg_counting"}, {}, "have no entry of reasoning-gym; give"),
        ('{"broken', {}, "is no JSON"),
        ({"entry": 3}, {}, "3 is no object"),
        (None, {"answer": "1", "metadata": {}}, "names no task; give metadata.source_dataset"),
    ],
)
def test_ground_truths_that_are_none(ground_truth: Any, row: dict[str, Any], problem: str) -> None:
    found = check_ground_truth("reasoning_gym", ground_truth, row)
    assert found is not None
    with pytest.raises(ValueError, match=problem) as error:
        grade("1", ground_truth, row)
    assert str(error.value) == found


def test_without_the_row_a_text_may_be_good() -> None:
    assert check_ground_truth("reasoning_gym", "292") is None
    assert check_ground_truth("reasoning_gym", None) is None
    assert check_ground_truth("reasoning_gym", {"dataset": "x"}) is not None


def test_a_task_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="has no task 'leg_countin'; did you mean 'leg_counting'"):
        grade("1", {"dataset": "leg_countin", "entry": ENTRY})


def test_generated_entries_in_a_pool() -> None:
    names = ["basic_arithmetic", "word_sorting", "arc_agi", "propositional_logic"]
    entries = [reasoning_gym.create_dataset(name, size=1, seed=3)[0] for name in names]
    rows = [json.loads(json.dumps(entry)) for entry in entries]
    with GraderPool(RewardConfig(grader="reasoning_gym", workers=1, binary=True)) as pool:
        right = [Item(f"<answer>{row['answer']}</answer>", row["answer"], row=row) for row in rows[:3]]
        wrong = [Item("<answer>no</answer>", row["answer"], row=row) for row in rows]
        assert [one.score for one in pool.grade(right + wrong)] == [1.0] * 3 + [0.0] * 4
        assert pool.problems == {}
