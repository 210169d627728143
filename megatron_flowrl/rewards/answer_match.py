"""`answer_match`: text against text after `Answer:`, as FlowRL's published runs on mathematics were trained.

What stands behind the last `Answer:` (in any case) within the last 300 characters, to the end of its line, is the
answer; where there is none the response is wrong, whatever it says. Answer and ground truth are compared as text, after
the trimmings of LaTeX, units and thousands' commas are taken from both. That knows no mathematics: 0.5 is not 1/2 here.
`math`, by which the same runs were evaluated, does; a run says by its grader's name which of the two it had.

The ground truth is as for `exact`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megatron_flowrl.rewards.answer import boxed_answer
from megatron_flowrl.rewards.grader import Grader, Item
from megatron_flowrl.rewards.text import by_text, check_ground_truth

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig

READ_CHARACTERS = 300
_MARK = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]|\\?[$%]|\^\{?\\circ\}?|\\degree(?![A-Za-z])|~|\s"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}")
_UNITS = re.compile(
    r"(?<=[0-9}.])(?:degrees?|dollars?|cents?|units?|inch(?:es)?|feet|foot|miles?|mph|k?meters?|cm|km|gm?|grams?|pounds?|"
    r"seconds?|minutes?|hours?|days?|years?|square|cubic|percent|points?|people|ways)+(?:\^[23])?$"
)
_BARE_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|([0-9a-z]))(?:\{([^{}]*)\}|([0-9a-z]))")
_BARE_ROOT = re.compile(r"\\sqrt([0-9a-z])")
_COMMAS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")


def make(settings: RewardConfig) -> Grader:
    """The grader."""

    def found(item: Item) -> str | None:
        marked = _MARK.findall(item.response[-READ_CHARACTERS:])
        return normalized(marked[-1]) if marked else None

    return by_text(found, normalized)


def normalized(answer: str) -> str:
    """The text that is compared: no spaces, dollar signs, \\boxed, \\text or units; fractions with their braces."""
    inside = boxed_answer(answer)
    text = answer if inside is None else inside
    while (unwrapped := _WRAPPED.sub(r"\1", text)) != text:
        text = unwrapped
    text = _DROPPED.sub("", text.rpartition("=")[2].replace("{,}", ",")).rstrip(".")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    text = _BARE_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", _UNITS.sub("", text))
    return text.replace(",", "") if _COMMAS.fullmatch(text) else text


__all__ = ["READ_CHARACTERS", "check_ground_truth", "make", "normalized"]
