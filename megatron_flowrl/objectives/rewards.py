"""What is made of rewards before a loss sees them: differences within the answers to one prompt.

Everything is in fp64: in fp32 seven rewards of 0.7 have a mean that none of them equals, and a difference of 0 divided
by a spread of almost 0 becomes 0.056.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import group_sums

RewardTransform = Literal["raw", "group_mean", "leave_one_out", "group_norm"]
_EPSILON = 1e-6


def transform_rewards(rewards: Tensor, groups: Tensor, how: RewardTransform) -> Tensor:
    """Rewards [M] and the prompt each belongs to, int64 [M] -> fp64 [M].

    raw             r
    group_mean      r - mean of the group                     (shrinks beta to beta (1 - 1/G) in a trajectory balance)
    leave_one_out   r - mean of the others of the group       (harmless there: log Z takes it up)
    group_norm      (r - mean) / (std + 1e-6), std unbiased   (a temperature of its own for each prompt; FlowRL, GRPO)

    An answer that is alone keeps its reward. Equal rewards give exactly 0, but for `raw`.
    """
    rewards = rewards.double()
    if how == "raw":
        return rewards
    # Differences are taken from a member of the group, so that equal rewards give zeros and not roundings.
    shifted = rewards - _least_of_group(rewards, groups)
    sums, sizes = group_sums(shifted, groups)
    others = (sizes - 1).clamp(min=1)
    if how == "leave_one_out":
        changed = shifted - (sums - shifted) / others
    else:
        changed = shifted - sums / sizes
        if how == "group_norm":
            squares, _ = group_sums(changed**2, groups)
            changed = changed / ((squares / others).sqrt() + _EPSILON)
    return torch.where(sizes > 1, changed, rewards)


def informative(rewards: Tensor, groups: Tensor) -> Tensor:
    """Which answers belong to a group whose rewards differ: bool [M]. A group of one does not differ.

    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) keeps these only.
    """
    spread, _ = group_sums((rewards.double() != _least_of_group(rewards.double(), groups)).double(), groups)
    return spread > 0


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """0 up to `max_tokens - buffer`, then falling to -1 at `max_tokens`: fp64 [M], to be added to the rewards.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"overlong buffer of {buffer} tokens must be above 0 and at most max_tokens = {max_tokens}")
    return -((lengths.double() - (max_tokens - buffer)) / buffer).clamp(0.0, 1.0)


def _least_of_group(values: Tensor, groups: Tensor) -> Tensor:
    _, number = torch.unique(groups, return_inverse=True)
    count = int(number.max()) + 1 if number.numel() else 0
    least = torch.full((count,), torch.inf, dtype=values.dtype, device=values.device)
    return least.scatter_reduce(0, number, values, "amin")[number]
