"""Countdown: reach a target from given numbers by + - * / and parentheses, each number used exactly once.

Ground truth: {"numbers": [3, 5, 7], "target": 26}, as an object or as its JSON text, or else columns `numbers` and
`target` of the row. Numbers are integers from 0 on.

The answer is the first line after the last `Answer:`; where there is none, what stands in the last
<answer></answer>; where there is none either, the last line of the response. `= 26` may follow, if it is right. The
score is 1.0 where the expression uses exactly the given numbers and its exact value is the target, 0.0 otherwise; the
key is the expression's canonical form (`expression.py`), for a wrong one too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

from megatron_flowrl.rewards.answer import final_answer
from megatron_flowrl.rewards.expression import (
    MOST_NUMBERS,
    Expression,
    NotAnExpression,
    add,
    divide,
    multiply,
    number,
    parse_expression,
    subtract,
)
from megatron_flowrl.rewards.grader import Grade, Grader, Item, shown

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig

_VALUE = re.compile(r"\s*([-\u2212]?[0-9]{1,20}(?:\s*/\s*0*[1-9][0-9]{0,19})?)\s*")


def make(settings: RewardConfig) -> Grader:
    """The grader."""
    return grade


def grade(items: Sequence[Item]) -> list[Grade]:
    """What `make` makes."""
    return [_grade(item) for item in items]


def check_ground_truth(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a ground truth, or None."""
    try:
        _problem_of(ground_truth, row or {})
    except ValueError as error:
        return str(error)
    return None


def enumerate_solutions(numbers: Sequence[int], target: int) -> frozenset[str]:
    """The keys of all right answers, by search through all expressions that use each number once.

    A few milliseconds for four numbers, a second for five; six take a minute. Raises ValueError for numbers that the
    grader would refuse.
    """
    numbers = tuple(sorted(_integers(numbers)))
    goal = Fraction(_integer(target, "target"))
    if len(numbers) == 1:
        return frozenset({str(numbers[0])} if numbers[0] == goal else ())
    found: set[str] = set()
    for left, right in _splits(numbers):
        by_value: dict[Fraction, list[Expression]] = {}
        for one in _all_expressions(right).values():
            by_value.setdefault(one.value, []).append(one)
        for a in _all_expressions(left).values():
            value = a.value
            found.update(add(a, b).key for b in by_value.get(goal - value, ()))
            found.update(subtract(a, b).key for b in by_value.get(value - goal, ()))
            found.update(subtract(b, a).key for b in by_value.get(value + goal, ()))
            if value:
                found.update(multiply(a, b).key for b in by_value.get(goal / value, ()))
                found.update(divide(b, a).key for b in by_value.get(goal * value, ()))
            elif not goal:
                found.update(multiply(a, b).key for some in by_value.values() for b in some)
            if goal:
                found.update(divide(a, b).key for b in by_value.get(value / goal, ()) if value)
            elif not value:
                found.update(divide(a, b).key for size, some in by_value.items() if size for b in some)
    return frozenset(found)


def count_solutions(numbers: Sequence[int], target: int) -> int:
    """How many different right answers there are; see `enumerate_solutions`."""
    return len(enumerate_solutions(numbers, target))


@lru_cache(maxsize=4096)
def _all_expressions(numbers: tuple[int, ...]) -> dict[str, Expression]:
    """Key -> expression, of all that use each of the sorted numbers once."""
    if len(numbers) == 1:
        return {str(numbers[0]): number(numbers[0])}
    found: dict[str, Expression] = {}
    for left, right in _splits(numbers):
        for a in _all_expressions(left).values():
            for b in _all_expressions(right).values():
                made = [add(a, b), subtract(a, b), subtract(b, a), multiply(a, b)]
                if b.body.size:
                    made.append(divide(a, b))
                if a.body.size:
                    made.append(divide(b, a))
                found.update((one.key, one) for one in made)
    return found


@lru_cache(maxsize=4096)
def _splits(numbers: tuple[int, ...]) -> frozenset[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ways to part sorted numbers in two, neither empty; which part comes first is left to chance."""
    ways = set()
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(range(len(numbers)), size):
            left = tuple(numbers[place] for place in chosen)
            right = tuple(numbers[place] for place in range(len(numbers)) if place not in chosen)
            ways.add((left, right) if (len(left), left) <= (len(right), right) else (right, left))
    return frozenset(ways)


def _grade(item: Item) -> Grade:
    numbers, target = _problem_of(item.ground_truth, item.row)
    text, equals, said = final_answer(item.response).partition("=")
    try:
        expression, used = parse_expression(text)
    except NotAnExpression:
        return Grade(0.0)
    right = sorted(used) == sorted(numbers) and expression.value == target
    if equals:
        match = _VALUE.fullmatch(said)
        right = right and match is not None and Fraction("".join(match[1].split()).replace("\u2212", "-")) == target
    return Grade(1.0 if right else 0.0, expression.key)


def _problem_of(ground_truth: Any, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """Numbers and target. Raises ValueError where there are none."""
    if isinstance(ground_truth, str) and ground_truth.lstrip().startswith("{"):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError as error:
            raise ValueError(f"the ground truth {shown(ground_truth)} is no JSON: {error}") from error
    for source in (ground_truth, row):
        if isinstance(source, Mapping) and "numbers" in source and "target" in source:
            return _integers(source["numbers"]), _integer(source["target"], "target")
    raise ValueError(
        f'the ground truth {shown(ground_truth)} has no numbers and target; give {{"numbers": [3, 5, 7], "target": 26}}'
    )


def _integers(numbers: Any) -> list[int]:
    if isinstance(numbers, str | bytes | Mapping) or not hasattr(numbers, "__len__") or len(numbers) == 0:
        raise ValueError(f"numbers = {shown(numbers)} is no list of numbers")
    if len(numbers) > MOST_NUMBERS:
        raise ValueError(f"numbers has {len(numbers)} of them; give at most {MOST_NUMBERS}")
    integers = [_integer(one, "numbers") for one in numbers]
    if min(integers) < 0:
        raise ValueError(f"numbers = {shown(integers)} has a negative one; give integers from 0 on")
    return integers


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__int__"):
        raise ValueError(f"{name} = {shown(value)} is no integer")
    try:
        integer = int(value)  # NumPy's integers, as Parquet gives them, and 26.0
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} = {shown(value)} is no integer") from None
    if integer != value:
        raise ValueError(f"{name} = {shown(value)} is no integer")
    return integer


__all__ = [
    "check_ground_truth",
    "count_solutions",
    "enumerate_solutions",
    "grade",
    "make",
]
