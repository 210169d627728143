"""Countdown with four numbers: reach a target by + - and brackets, each number used once, written in any way.

The answers to a problem are its writings: `7-2+3+1`, `3+1+7-2` and `7-(2-3-1)` are three of them; brackets that change
nothing do not make another. All of them are known, so that what a model covers of them is exact.

Which number is to be taken away is for the model to find out. No problem needs two of them taken away, which a model
of three layers does not learn in minutes: one that cannot solve its problems leaves the ways of solving them that it is
unsure of, where only the reward counts.

The responses of the warm start have three styles, drawn unequally: a writing's chance is in proportion to its style's
weight. And some are careless: they forget the last number. So there is something to learn, and something to keep: a
policy that samples in proportion to its reward stops being careless and goes on to write in every style.

A right answer is worth 1, and a tenth more where its numbers rise: no reward is blind to how a thing is said. Who
maximises reward has a reason to write in that one way alone; a policy in proportion to exp(beta reward) writes in it
somewhat more.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations_with_replacement, pairwise, permutations
from typing import Any

from megatron_flowrl.rewards import countdown
from megatron_flowrl.rewards.answer import final_answer
from megatron_flowrl.rewards.grader import Grade, Item

NUMBERS = range(1, 13)
COUNT = 4  # numbers of a problem
TARGETS = range(1, 100)
TAKEN_AWAY = 1  # numbers of a problem that count as negative, at most
FEWEST = 4  # writings of a problem that is asked; the warm start has those with fewer too
STYLES = {"rising": 8, "falling": 3, "mixed": 1}
"""The order in which a writing has its numbers -> weight."""
CARELESS = 0.7
"""Share of the warm start's responses that lack their last number."""
BONUS = {"rising": 0.1}
"""What a right answer of a style is worth beyond 1."""
SPLITS = {"train": 0.9, "validation": 0.05, "test": 0.05}

PIECES = ("<pad>", "<eos>", *map(str, range(100)), "+", "-", "(", ")", "=", ":")
"""The vocabulary: whole numbers are single tokens."""

_OPERATORS: Mapping[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-"}
_LONGEST = 40  # characters of a writing, and more than any has


@dataclass(frozen=True)
class Problem:
    """Numbers in ascending order, and all writings, sorted."""

    numbers: tuple[int, ...]
    target: int
    writings: tuple[str, ...]


@dataclass(frozen=True)
class _Written:
    """A number, or an expression."""

    text: str
    value: int
    numbers: int
    negative: int  # of its numbers


def problems() -> list[Problem]:
    """All problems, in a fixed order."""
    found = []
    for numbers in combinations_with_replacement(NUMBERS, COUNT):
        by_target: dict[int, set[_Written]] = {}
        for order in set(permutations(numbers)):
            for one in _all_written(order):
                by_target.setdefault(one.value, set()).add(one)
        for target in TARGETS:
            written = by_target.get(target, set())
            if written and all(one.negative <= TAKEN_AWAY for one in written):
                found.append(Problem(numbers, target, tuple(sorted(one.text for one in written))))
    return found


def split(found: Sequence[Problem], seed: int) -> dict[str, list[Problem]]:
    """The problems that are asked, by split, none in two."""
    asked = [problem for problem in found if len(problem.writings) >= FEWEST]
    random.Random(seed).shuffle(asked)
    parts, start = {}, 0
    for name, share in SPLITS.items():
        stop = len(asked) if name == [*SPLITS][-1] else start + round(share * len(asked))
        parts[name], start = asked[start:stop], stop
    return parts


def prompt_of(problem: Problem, chance: random.Random) -> str:
    """`3 5 2 = 17 :`, the numbers in any order."""
    numbers = chance.sample(problem.numbers, len(problem.numbers))
    return f"{' '.join(map(str, numbers))} = {problem.target} :"


def row_of(problem: Problem, chance: random.Random) -> dict[str, Any]:
    """A row for `train`."""
    return {
        "prompt": prompt_of(problem, chance),
        "ground_truth": {"numbers": list(problem.numbers), "target": problem.target},
        "num_solutions": len(problem.writings),
        "writings": list(problem.writings),
    }


def response_row_of(problem: Problem, chance: random.Random) -> dict[str, str]:
    """A row for `sft`: a writing by the weight of its style, now and then without its last number."""
    weights = [STYLES[style_of(writing)] for writing in problem.writings]
    (writing,) = chance.choices(problem.writings, weights)
    response = without_last_number(writing) if chance.random() < CARELESS else writing
    return {"prompt": prompt_of(problem, chance), "response": response}


def without_last_number(writing: str) -> str:
    """`7-2+3` of `7-2+3+1`, `7-2` of `7-(2-3)`."""
    kept = re.sub(r"[+-]\(*\d+\)*$", "", writing)
    without = writing_of(kept + ")" * (kept.count("(") - kept.count(")")))
    assert without is not None
    return without


@cache
def style_of(writing: str) -> str:
    """`rising` where no number is below the one before it, else `falling` where none is above, else `mixed`."""
    numbers = [int(text) for text in re.findall(r"\d+", writing)]
    if all(a <= b for a, b in pairwise(numbers)):
        return "rising"
    return "falling" if all(a >= b for a, b in pairwise(numbers)) else "mixed"


def writing_of(text: str) -> str | None:
    """The text without brackets that change nothing; None where it is no expression of numbers and + -."""
    if len(text) > _LONGEST:
        return None
    try:
        return _written(ast.parse(text.strip(), mode="eval").body).text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def grade(items: Sequence[Item]) -> list[Grade]:
    """`reward.grader=examples.countdown.task.grade`: 0 if wrong, as `countdown` says, else what the writing is worth.

    The writing is the key. What follows an `=` does not count. A right answer that is none of the row's writings (which
    a sign before a number makes) has no key.
    """
    grades = []
    for item, one in zip(items, countdown.grade(items), strict=True):
        writing = writing_of(final_answer(item.response).partition("=")[0])
        known = item.row.get("writings")
        key = writing if known is None or writing in known else None
        grades.append(replace(one, score=reward_of(key) if one.score and key else one.score, key=key))
    return grades


def reward_of(writing: str) -> float:
    """What a right answer is worth that is written so."""
    return 1.0 + BONUS.get(style_of(writing), 0.0)


def _all_written(numbers: tuple[int, ...]) -> Iterator[_Written]:
    """All expressions that have the numbers in this order."""
    if len(numbers) == 1:
        yield _Written(str(numbers[0]), numbers[0], numbers=1, negative=0)
        return
    for place in range(1, len(numbers)):
        for left in _all_written(numbers[:place]):
            for right in _all_written(numbers[place:]):
                for operator in _OPERATORS.values():
                    yield _joined(left, operator, right)


def _joined(left: _Written, operator: str, right: _Written) -> _Written:
    if operator == "+":
        text, value, negative = f"{left.text}+{right.text}", left.value + right.value, right.negative
    else:
        behind = right.text if right.numbers == 1 else f"({right.text})"
        text, value, negative = f"{left.text}-{behind}", left.value - right.value, right.numbers - right.negative
    return _Written(text, value, left.numbers + right.numbers, left.negative + negative)


def _written(node: ast.expr) -> _Written:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _joined(_written(node.left), _OPERATORS[type(node.op)], _written(node.right))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _Written(str(node.value), node.value, numbers=1, negative=0)
    raise ValueError("no expression of numbers and + -")


__all__ = [
    "CARELESS",
    "PIECES",
    "SPLITS",
    "STYLES",
    "Problem",
    "grade",
    "problems",
    "prompt_of",
    "response_row_of",
    "reward_of",
    "row_of",
    "split",
    "style_of",
    "without_last_number",
    "writing_of",
]
