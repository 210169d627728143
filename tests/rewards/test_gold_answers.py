"""The benchmarks' own answers, where their files are: each is right against itself, and wrong against another value.

The files are no part of the project. The pairs are made by an order that a seed fixes: each answer against the next of
another text. Of these pairs, those in EQUIVALENT have been looked at, and are the same value in other words.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.grader import Item
from megatron_flowrl.rewards.pool import GraderPool

DATA = Path(__file__).parents[3] / "shared" / "data"
EQUIVALENT: set[frozenset[str]] = set()


def answers_of(name: str) -> list[str]:
    return [json.loads(line)["answer"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["math500", "gsm8k", "aime24"])
def test_a_gold_answer_is_right_and_another_is_wrong(name: str) -> None:
    if not (DATA / f"{name}.jsonl").is_file():
        pytest.skip(f"{name}.jsonl is not here")
    gold = answers_of(name)
    different = sorted({*gold})
    random.Random(0).shuffle(different)
    pairs = [pair for pair in zip(different, different[1:] + different[:1], strict=True) if {*pair} not in EQUIVALENT]
    with GraderPool(RewardConfig(grader="math", workers=2, timeout_seconds=30.0)) as pool:
        right = pool.grade([Item(f"So it is \\boxed{{{one}}}.", one) for one in gold])
        wrong = pool.grade([Item(f"So it is \\boxed{{{one}}}.", other) for one, other in pairs])
        assert pool.problems == {}
    assert [gold[i] for i, grade in enumerate(right) if grade.score != 1.0] == []
    assert [pairs[i] for i, grade in enumerate(wrong) if grade.score != 0.0] == []
