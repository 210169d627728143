"""From `reward.grader` to a grader: built-in ones, the user's own, and weighted sums of both.

math                                    one
math + 0.1 * format - 0.5 * overlong    a sum; its key is the first one's, and a problem of any is the sum's
my_package.rewards.tidy                 the user's function
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from megatron_flowrl.config.errors import UserError
from megatron_flowrl.rewards.grader import Grade, Grader, Item, bounded_key, shown

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig


@dataclass(frozen=True)
class BuiltIn:
    """Where a grader is made: `make(settings)`, and `check(ground_truth, row)` -> a problem or None."""

    module: str
    make: str = "make"
    check: str = "check_ground_truth"

    def attribute(self, name: str) -> Callable[..., Any]:
        """Of the module, which is imported when it is wanted."""
        found: Callable[..., Any] = getattr(importlib.import_module(f"megatron_flowrl.rewards.{self.module}"), name)
        return found


BUILT_IN: Mapping[str, BuiltIn] = {
    "math": BuiltIn("math"),
    "answer_match": BuiltIn("answer_match"),
    "exact": BuiltIn("text", "make_exact"),
    "choice": BuiltIn("text", "make_choice", "check_choice"),
    "regex": BuiltIn("text", "make_regex"),
    "countdown": BuiltIn("countdown"),
    "reasoning_gym": BuiltIn("reasoning_gym"),
    "code": BuiltIn("code"),
    "remote": BuiltIn("remote"),
    "format": BuiltIn("form", "make_format"),
    "overlong": BuiltIn("form", "make_overlong"),
}

_TERM = re.compile(r"(?:(\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?([^\s*+]+)")


def make_grader(settings: RewardConfig) -> Grader:
    """The grader of `reward.grader`, to be called in this process.

    What it returns gives a Grade for each item, whatever a function of the user's gives: a score that is no finite
    number is a Grade with a problem. It raises ValueError where the function returns another number of scores than it
    was given items, and what the function raises.

    Raises UserError where a name is none, or the function cannot be imported or called, or something is missing: a
    package, a setting that the grader needs.
    """
    check_names(settings.grader)
    terms = terms_of(settings.grader)
    graders = [(weight, _found(name, settings)) for weight, name in terms]
    if terms == [(1.0, settings.grader)]:
        return graders[0][1]
    return lambda items: _summed([(weight, grader(items)) for weight, grader in graders])


def check_ground_truth(grader: str, ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What a grader could not work with, in a sentence; None where it can, and for a user's function.

    With the row's columns, if given, a built-in grader that also reads those can say more. Imports no grader's
    library and runs nothing of it: data can be checked in a process that does not grade.
    """
    for _, name in terms_of(grader):
        if name in BUILT_IN:
            problem: str | None = BUILT_IN[name].attribute(BUILT_IN[name].check)(ground_truth, row)
            if problem is not None:
                return problem
    return None


def check_names(grader: str) -> None:
    """Raises UserError where a term names no grader, as far as that can be told without importing anything."""
    for _, name in terms_of(grader):
        if name not in BUILT_IN and "." not in name:
            raise UserError(
                f"reward.grader = {name!r} is none of {', '.join(BUILT_IN)}{_near(name, BUILT_IN)}; give one of them, "
                "or a function of your own as package.module.function"
            )


def terms_of(grader: str) -> list[tuple[float, str]]:
    """(weight, name) of each term of a sum; a name alone has weight 1. Raises UserError where it is no sum."""
    first, *rest = re.split(r"(?:^|\s+)([+-])\s+", grader.strip())
    signed = [("+", first)] if first else []
    terms = []
    for sign, text in [*signed, *zip(rest[::2], rest[1::2], strict=True)]:
        match = _TERM.fullmatch(text.strip())
        if match is None:
            raise UserError(
                f"reward.grader = {grader!r}: {text!r} is no term of a sum; give names, or weight * name, with + or - "
                "between them: math + 0.1 * format"
            )
        terms.append((float(f"{sign}{match[1] or 1}"), match[2]))
    return terms


def _summed(terms: Sequence[tuple[float, Sequence[Grade]]]) -> list[Grade]:
    sums = []
    for grades in zip(*(grades for _, grades in terms), strict=True):
        score = sum(weight * grade.score for (weight, _), grade in zip(terms, grades, strict=True))
        problem = next((grade.problem for grade in grades if grade.problem is not None), None)
        sums.append(Grade(0.0 if problem else score, grades[0].key, problem))
    return sums


def _found(name: str, settings: RewardConfig) -> Grader:
    if name in BUILT_IN:
        return _checked(BUILT_IN[name].attribute(BUILT_IN[name].make)(settings))
    return _checked(_own_function(name))


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


__all__ = ["BUILT_IN", "check_ground_truth", "check_names", "make_grader", "terms_of"]
