"""Answers that are compared as text: `exact`, `choice` and `regex`.

Ground truth: a text, a number, or a list of them of which any is right; for `choice` a letter. Where the answer stands:

    exact    after the last `Answer:` (its line), else in the last <answer>..</answer>, else the last line
    choice   in the last \\boxed{}, else as for `exact`; of that the first letter that stands alone: B, (B), **B.**
    regex    the last match of reward.pattern in the response: its first group, if it has one

Spaces around an answer do not count, and several count as one; neither does a full stop at the end, nor for `choice`
the case of the letter. The answer is the key.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from megatron_flowrl.config.errors import UserError
from megatron_flowrl.rewards.answer import boxed_answer, final_answer
from megatron_flowrl.rewards.grader import Grade, Grader, Item, shown

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig

READ_CHARACTERS = 50_000
"""The end of a response that is searched by reward.pattern."""

# A letter before a bracket, or a capital; an A or I that words follow is an article, or who speaks.
_LETTER = re.compile(r"(?<![^\W_])([A-Za-z](?=\))|[B-HJ-Z](?![^\W_]|['\u2019])|[AI](?![^\W_]|['\u2019]|\s+[a-z]))")


def make_exact(settings: RewardConfig) -> Grader:
    """The `exact` grader."""
    return by_text(lambda item: plain(final_answer(item.response)), plain)


def make_choice(settings: RewardConfig) -> Grader:
    """The `choice` grader."""

    def letter(text: str) -> str | None:
        alone = re.fullmatch(r"\W*([A-Za-z])\W*", text)
        found = alone or _LETTER.search(text)
        return found[1].upper() if found else None

    return by_text(lambda item: letter(boxed_answer(item.response) or final_answer(item.response)), letter)


def make_regex(settings: RewardConfig) -> Grader:
    """The `regex` grader. Raises UserError where reward.pattern is no pattern."""
    pattern = compiled("reward.pattern", settings.pattern, "regex")

    def found(item: Item) -> str | None:
        last = deque(pattern.finditer(item.response[-READ_CHARACTERS:]), maxlen=1)
        return plain((last[0][1] if pattern.groups else last[0][0]) or "") if last else None

    return by_text(found, plain)


def compiled(setting: str, pattern: str | None, grader: str) -> re.Pattern[str]:
    """A setting's pattern, of lines (re.MULTILINE). Raises UserError where there is none, or it is no pattern."""
    if pattern is None:
        raise UserError(f"reward.grader has {grader!r}, which needs {setting}: give a regular expression")
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise UserError(f"{setting} = {pattern!r} is no regular expression: {error}") from error


def check_ground_truth(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a ground truth, or None."""
    try:
        texts_of(ground_truth)
    except ValueError as error:
        return str(error)
    return None


def check_choice(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a ground truth of `choice`, or None."""
    if isinstance(ground_truth, str) and re.fullmatch(r"\W*[A-Za-z]\W*", ground_truth):
        return None
    return f"the ground truth {shown(ground_truth)} is no letter; give A, B, C .."


def by_text(found: Callable[[Item], str | None], normalized: Callable[[str], str | None]) -> Grader:
    """Right is an answer that is, normalized, one of the ground truth's texts."""

    def grade(items: Sequence[Item]) -> list[Grade]:
        grades = []
        for item in items:
            answer = found(item)
            right = [normalized(text) for text in texts_of(item.ground_truth)]
            grades.append(Grade(float(bool(answer) and answer in right), answer or None))
        return grades

    return grade


def plain(text: str) -> str:
    """Without spaces and a full stop that do not count."""
    return " ".join(text.split()).removesuffix(".").rstrip()


def texts_of(ground_truth: Any) -> list[str]:
    """The right answers. Raises ValueError where there are none."""
    given = list(ground_truth) if isinstance(ground_truth, list | tuple) else [ground_truth]
    if given and all(_is_text(one) for one in given):
        return [str(one).strip() for one in given]
    raise ValueError(f"the ground truth {shown(ground_truth)} is no answer; give text, a number, or a list of them")


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


__all__ = [
    "READ_CHARACTERS",
    "by_text",
    "check_choice",
    "check_ground_truth",
    "compiled",
    "make_choice",
    "make_exact",
    "make_regex",
    "plain",
    "texts_of",
]
