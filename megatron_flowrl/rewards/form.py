"""Terms of a sum that look at the form of an answer, whatever it says: `format` and `overlong`.

    format      1 where all of the response matches reward.format, else 0
    overlong    1 where the response was cut off at its limit of tokens, else 0; weigh it below zero

A penalty that grows before the limit is `objective.overlong_buffer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_flowrl.rewards.grader import Grade, Grader
from megatron_flowrl.rewards.text import compiled

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig


def make_format(settings: RewardConfig) -> Grader:
    """The `format` term. Raises UserError where reward.format is no pattern."""
    pattern = compiled("reward.format", settings.format, "format")
    return lambda items: [Grade(float(pattern.fullmatch(item.response) is not None)) for item in items]


def make_overlong(settings: RewardConfig) -> Grader:
    """The `overlong` term."""
    return lambda items: [Grade(float(item.finish_reason == "length")) for item in items]


def check_ground_truth(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """Nothing is wrong with any: none is looked at."""
    return None


__all__ = ["check_ground_truth", "make_format", "make_overlong"]
