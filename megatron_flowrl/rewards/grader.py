"""What graders are given and give: a batch of answers in, a grade for each out, in order.

`reward.grader` names a built-in one or, as `package.module.function`, the user's own:

    def function(items: Sequence[Item]) -> Sequence[float | Grade]: ...

It runs in processes of its own (`pool.py`), which import it from where the trainer can, or from the working directory,
and give it one item at a time. It may raise, hang or crash: that costs the item its score, and nothing else. Higher
is better; `reward.correct_from` says from where on an answer counts as correct.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from megatron_flowrl.config.errors import UserError

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


__all__ = ["Grade", "Grader", "Item", "bounded_key", "import_library", "shown"]
