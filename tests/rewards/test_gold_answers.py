"""The benchmarks' own answers, where their files are: each is right against itself, and wrong against another value.

The files are no part of the project. Of MATH500's 301 different answers all pairs are tried, in both orders; of the
others, which are numbers alone, each against the next in an order that a seed fixes. The pairs in EQUIVALENT have been
looked at: they are the same value in other words, or read as math-verify does by what they may stand for (an equation
for the value of its side, `-2,1` for a set).
"""

from __future__ import annotations

import json
import random
from itertools import permutations
from pathlib import Path

import pytest

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.grader import Item
from megatron_flowrl.rewards.pool import GraderPool

DATA = Path(__file__).parents[3] / "shared" / "data"
EQUIVALENT = {
    frozenset(pair)
    for pair in (
        ("(-2,1)", "-2,1"),
        ("(-2,1)", "1,-2"),
        ("-2,1", "1,-2"),
        ("10,\\!080", "10080"),
        ("120", "120^\\circ"),
        ("15", "15\\mbox{ cm}^2"),
        ("2 \\sqrt{5}", "2\\sqrt{5}"),
        ("30", "30^\\circ"),
        ("36", "36^\\circ"),
        ("36", "\\$36"),
        ("36^\\circ", "\\$36"),
        ("5", "x=5"),
        ("5x - 7y + 11z + 4 = 0", "0"),
        ("90", "90^\\circ"),
        ("\\frac14", "\\frac{1}{4}"),
    )
}


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
    tried = zip(different, different[1:] + different[:1], strict=True)
    pairs = [*(permutations(different, 2) if name == "math500" else tried)]
    pairs = [pair for pair in pairs if frozenset(pair) not in EQUIVALENT]
    with GraderPool(RewardConfig(grader="math", workers=2, timeout_seconds=30.0)) as pool:
        right = pool.grade([Item(f"So it is \\boxed{{{one}}}.", one) for one in gold])
        wrong = pool.grade([Item(f"So it is \\boxed{{{one}}}.", other) for one, other in pairs])
        assert pool.problems == {}
    assert [gold[i] for i, grade in enumerate(right) if grade.score != 1.0] == []
    assert [pairs[i] for i, grade in enumerate(wrong) if grade.score != 0.0] == []
