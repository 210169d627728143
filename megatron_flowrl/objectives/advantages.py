"""Advantages of tokens, [T] fp64, over all answers of a rollout. GRPO's are of whole answers: see rewards.py."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-8


def token_rewards(rewards: Tensor, offsets: Tensor, penalty: Tensor | None = None) -> Tensor:
    """Rewards of tokens, [T]: an answer's reward [M] at its last token, less `penalty` [T] at each.

    offsets: int64 [M + 1]. The reward of an empty answer has no token, and counts for nothing.
    """
    given = torch.zeros(int(offsets[-1]), dtype=torch.float64, device=rewards.device)
    if penalty is not None:
        given -= penalty.double()
    some = offsets.diff() > 0
    return given.index_add(0, offsets[1:][some] - 1, rewards.double()[some])


def discounted_sums(values: Tensor, offsets: Tensor, discount: float) -> Tensor:
    """s_t = v_t + discount s_(t+1) within each answer, [T]: from its end to its beginning."""
    lengths = offsets.diff()
    longest_first = lengths.argsort(descending=True)
    ends = offsets[1:][longest_first]
    reaching = torch.bincount(lengths).flip(0).cumsum(0).flip(0)[1:].tolist()  # how many have 1, 2, ... tokens
    sums = values.double().clone()
    following = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    for back, count in enumerate(reaching, 1):
        places = ends[:count] - back
        following[:count] = sums[places] + discount * following[:count]
        sums[places] = following[:count]
    return sums


def generalized_advantages(
    rewards: Tensor, values: Tensor, offsets: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE: (advantages, returns), [T] each; rewards of tokens and values of the states before them, [T].

    d_t = r_t + discount V_(t+1) - V_t with V = 0 after the end; A_t = d_t + discount lambda A_(t+1); return A_t + V_t.
    Schulman et al., "High-dimensional continuous control using generalized advantage estimation" (arXiv 1506.02438).
    """
    values = values.double()
    following = torch.cat([values[1:], values.new_zeros(min(1, len(values)))])
    ends = offsets[1:][offsets.diff() > 0] - 1
    following[ends] = 0.0
    differences = rewards.double() + discount * following - values
    advantages = discounted_sums(differences, offsets, discount * gae_lambda)
    return advantages, advantages + values


def standardize(values: Tensor) -> Tensor:
    """(v - mean) / (std + 1e-8) over all of them, [T]; equal ones, or a single one, give zeros."""
    if values.numel() == 0:
        return values.double()
    values = values.double()
    centred = values - values[0]  # exact for equal values
    centred = centred - centred.mean()
    return centred / (centred.square().mean().sqrt() + _EPSILON)
