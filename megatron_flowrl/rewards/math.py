"""Mathematics: whether the answer in a response equals the right one, by math-verify.

Ground truth: the right answer as text, in LaTeX or plain (`\\frac{14}{3}`, `$x=2$`, `18`), or as a number. The score is
1.0 or 0.0; the key is the answer that was found, in one notation where it is a rational number, and as it was written,
without spaces, where it is not. 40_9 and 40 are two numbers. Which answer is found is math-verify's choice: after
"final answer is", the last \\boxed, the last formula, the last number; several \\boxed that only a comma, "and" or "or"
separates are a set.

math-verify's own time limits are off: they use SIGALRM, and what they cut off would count as wrong. A pool's time limit
ends the process, and the answer counts as one that could not be graded. Call this grader in a pool only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from math import isfinite
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_flowrl.rewards.grader import Grade, Grader, Item, import_library, shown

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig

READ_CHARACTERS = 50_000
"""The end of a response that is searched for the answer."""

_LONGEST_NUMBER = 60
_IN_BASE = re.compile(r"-?[0-9A-Za-z]+_\{?(?P<base>\d+)\}?")


def make(settings: RewardConfig) -> Grader:
    """The grader. Raises UserError where math-verify is not installed."""
    library = import_library("math", "math_verify", "math-verify", "math")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

    @lru_cache(maxsize=1024)  # the answers to a prompt come one after another
    def gold(text: str) -> list[Any]:
        parsed = _parse_gold(library, text)
        if not parsed:
            raise ValueError(f"the ground truth {shown(text)} cannot be read")
        return parsed

    def grade(items: Sequence[Item]) -> list[Grade]:
        return [_grade(library, gold, item) for item in items]

    grade([Item("$x+1$ or 2", "\\frac{1}{2}")])  # builds its patterns and parsers now, in no answer's time
    return grade


def check_ground_truth(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a ground truth, or None. Whether math-verify can read it, grading will tell."""
    try:
        _text(ground_truth)
    except ValueError as error:
        return str(error)
    return None


def _grade(library: ModuleType, gold: Any, item: Item) -> Grade:
    right = gold(_text(item.ground_truth))
    found = _parse(library, item.response[-READ_CHARACTERS:])
    if not found:
        return Grade(0.0)
    equal = library.verify(right, found, timeout_seconds=None) and _base(right) == _base(found)
    return Grade(float(equal), _key(found))


def _parse(library: ModuleType, text: str) -> list[Any]:
    parsed: list[Any] = library.parse(text, parsing_timeout=None)
    return parsed


def _parse_gold(library: ModuleType, text: str) -> list[Any]:
    """math-verify finds LaTeX where it is marked as such."""
    if "\\boxed" in text:
        return _parse(library, text)
    marked = [f"\\boxed{{{text}}}", f"${text}$", text]
    return next(filter(None, map(partial(_parse, library), marked)), [])


def _text_of(found: list[Any]) -> str:
    """The text as math-verify found it is the last of what it gives, where it gives one."""
    return next(("".join(one.split()) for one in reversed(found) if isinstance(one, str)), "")


def _base(found: list[Any]) -> str | None:
    """Of a number as 40_9, the 9, which math-verify passes over."""
    match = _IN_BASE.fullmatch(_text_of(found).strip("$"))
    return match["base"] if match else None


def _key(found: list[Any]) -> str | None:
    text = _text_of(found)
    return _rational(found[0]) or _decimal(text) or text or None


def _rational(value: Any) -> str | None:
    if not getattr(value, "is_Rational", False) or max(abs(value.p), value.q) >= 10**_LONGEST_NUMBER:
        return None
    return str(Fraction(int(value.p), int(value.q)))


def _decimal(text: str) -> str | None:
    if len(text) > _LONGEST_NUMBER or not text.replace(".", "", 1).removeprefix("-").isdecimal():
        return None
    return str(Fraction(text))


def _text(ground_truth: Any) -> str:
    if isinstance(ground_truth, str) and ground_truth.strip():
        return ground_truth.strip()
    if isinstance(ground_truth, int | float) and not isinstance(ground_truth, bool) and isfinite(ground_truth):
        return str(ground_truth)
    raise ValueError(f"the ground truth {shown(ground_truth)} is no answer; give text, or a number")


__all__ = ["READ_CHARACTERS", "check_ground_truth", "make"]
