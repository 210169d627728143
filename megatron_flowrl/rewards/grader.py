"""Graders: a batch of answers in, a grade for each out, in order.

`reward.grader` names a built-in one or, as `package.module.function`, the user's own:

    def function(items: Sequence[Item]) -> Sequence[float | Grade]: ...

It runs in processes of its own (`pool.py`), which import it from where the trainer can, or from the working directory,
and give it one item at a time. It may raise, hang or crash: that costs the item its score, and nothing else. Higher
is better; `reward.correct_from` says from where on an answer counts as correct.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from megatron_flowrl.config.errors import UserError

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig

BUILT_IN: Mapping[str, str] = {
    "math": "megatron_flowrl.rewards.math",
    "countdown": "megatron_flowrl.rewards.countdown",
    "reasoning_gym": "megatron_flowrl.rewards.reasoning_gym",
}
"""Name -> module, which has make() -> Grader, and check_ground_truth(ground_truth, row) -> a problem or None."""

_LONGEST_KEY = 200
_LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Item:
    """An answer to be graded."""

    response: str

    ground_truth: Any
    """What the data set says is right, in the form that the grader wants."""

    prompt: str = ""

    row: Mapping[str, Any] = field(default_factory=dict)
    """The prompt's row of the data set, all columns."""

    finish_reason: str = "stop"
    """`stop`, or `length` where the answer was cut off."""


@dataclass(frozen=True)
class Grade:
    """What an answer is worth."""

    score: float

    key: str | None = None
    """Canonical form of the final answer, for counting distinct ones; None where there is none."""

    problem: str | None = None
    """Why it could not be graded; the score then means nothing, until a pool makes it reward.failed_score."""


Grader = Callable[[Sequence[Item]], Sequence[Grade]]


def make_grader(settings: RewardConfig) -> Grader:
    """The grader of `reward.grader`, to be called in this process; see `find_grader` for errors."""
    return find_grader(settings.grader)


def find_grader(name: str) -> Grader:
    """A built-in grader by its name, or a function by its dotted path.

    What it returns gives a Grade for each item, whatever the function gives: a score that is no finite number is a
    Grade with a problem. It raises ValueError where the function returns another number of scores than it was given
    items, and what the function raises.

    Raises UserError where the name is none, or the function cannot be imported or called, or needs a package that is
    not installed.
    """
    if name in BUILT_IN:
        return _checked(importlib.import_module(BUILT_IN[name]).make())
    if "." not in name:
        raise UserError(
            f"reward.grader = {name!r} is none of {', '.join(BUILT_IN)}{_near(name, BUILT_IN)}; give one of them, or a "
            "function of your own as package.module.function"
        )
    return _checked(_own_function(name))


def check_ground_truth(name: str, ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What a grader of this name could not work with, in a sentence; None where it can, and for a user's function.

    With the row's columns, if given, a built-in grader that also reads those can say more. Imports no grader's
    library and runs nothing of it: data can be checked in a process that does not grade.
    """
    if name not in BUILT_IN:
        return None
    problem: str | None = importlib.import_module(BUILT_IN[name]).check_ground_truth(ground_truth, row)
    return problem


def import_library(grader: str, module: str, package: str, extra: str) -> ModuleType:
    """A library that a built-in grader needs. Raises UserError where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"reward.grader = {grader!r} needs {package}, which cannot be imported ({error}); "
            f"pip install -e '.[{extra}]'"
        ) from error


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def bounded_key(key: str) -> str:
    """The key itself, or the start of a long one and a digest of all of it."""
    if len(key) <= _LONGEST_KEY:
        return key
    return f"{key[: _LONGEST_KEY // 2]}...{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _own_function(name: str) -> Callable[[Sequence[Item]], Iterable[object]]:
    module, _, function = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"reward.grader = {name!r}: {module} does not import: {error}; install it") from error
        raise UserError(
            f"reward.grader = {name!r}: there is no module {error.name!r} in the working directory {os.getcwd()} or on "
            f"sys.path; the built-in graders are {', '.join(BUILT_IN)}{_near(name, BUILT_IN)}"
        ) from error
    except Exception as error:
        raise UserError(
            f"reward.grader = {name!r}: {module} does not import: {type(error).__name__}: {error}; mend it"
        ) from error
    if not hasattr(home, function):
        raise UserError(f"reward.grader = {name!r}: {module} has no {function!r}{_near(function, vars(home))}")
    found = getattr(home, function)
    if not callable(found) or isinstance(found, type):
        raise UserError(
            f"reward.grader = {name!r} is of type {type(found).__name__}; name a function that takes a sequence of "
            "items and returns their scores"
        )
    checked: Callable[[Sequence[Item]], Iterable[object]] = found
    return checked


def _near(wrong: str, names: Iterable[str]) -> str:
    near = get_close_matches(wrong.rpartition(".")[2], names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _checked(function: Callable[[Sequence[Item]], Iterable[object]]) -> Grader:
    def grade(items: Sequence[Item]) -> Sequence[Grade]:
        scores = function(items)
        if isinstance(scores, str | bytes) or not isinstance(scores, Iterable):
            raise ValueError(f"the grader returned {shown(scores)}, not a sequence of scores")
        grades = [_as_grade(score) for score in scores]
        if len(grades) != len(items):
            raise ValueError(f"the grader returned {len(grades)} scores for {len(items)} items")
        return grades

    return grade


def _as_grade(given: object) -> Grade:
    grade = given if isinstance(given, Grade) else Grade(cast(float, given))
    key = None if grade.key is None else bounded_key(str(grade.key))
    if grade.problem is not None:
        return Grade(0.0, key, str(grade.problem))
    score = _finite(grade.score)
    if score is None:
        return Grade(0.0, key, f"score: {shown(grade.score)} is not a finite number")
    return Grade(score, key)


def _finite(score: object) -> float | None:
    if isinstance(score, str | bytes) or not hasattr(score, "__float__"):
        return None
    try:
        number = float(score)  # NumPy's and torch's scalars have __float__
    except (TypeError, ValueError, OverflowError, RuntimeError):  # NumPy's and torch's arrays of several
        return None
    return number if math.isfinite(number) else None


__all__ = [
    "BUILT_IN",
    "Grade",
    "Grader",
    "Item",
    "bounded_key",
    "check_ground_truth",
    "find_grader",
    "import_library",
    "make_grader",
    "shown",
]
