"""Importance weights: how much more likely an answer is under one policy than under the one that drew it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import Batch
from megatron_flowrl.objectives.mismatch import LOG_RATIO_LIMIT

ImportanceLevel = Literal["sum", "mean", "none"]
ImportanceClip = Literal["none", "max", "two_sided"]


@dataclass(frozen=True)
class ImportanceWeight:
    """w = clip(exp(sum over tokens of log pi - log pi_old)), without a gradient; FlowRL, section 3.2.

    level: `sum` over tokens, the ratio of the answers' probabilities; `mean`, its geometric mean per token (as GSPO);
    `none`: 1. clip: `none`, `max` (w <= maximum), `two_sided` (1 - low <= w <= 1 + high).

    The logarithm is kept in [-20, 20] under every clip, as exp overflows over thousands of tokens.
    """

    level: ImportanceLevel = "sum"
    clip: ImportanceClip = "max"
    maximum: float = 10.0
    low: float = 0.2
    high: float = 0.28

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights [S]; statistics [S]: `weight`, `weight_clipped` and `log_ratio_clamped` (1 where it was)."""
        log_ratio = batch.sum_tokens((batch.log_probs - batch.old_log_probs).detach())
        if self.level == "mean":
            log_ratio = log_ratio / batch.lengths.clamp(min=1.0)
        elif self.level == "none":
            log_ratio = torch.zeros_like(log_ratio)
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        weight = ratio
        if self.clip == "max":
            weight = ratio.clamp(max=self.maximum)
        elif self.clip == "two_sided":
            weight = ratio.clamp(1 - self.low, 1 + self.high)
        return weight, {
            "weight": weight,
            "weight_clipped": (weight != ratio).to(weight.dtype),
            "log_ratio_clamped": (log_ratio.abs() > LOG_RATIO_LIMIT).to(weight.dtype),
        }


def sampler_weights(
    old: Tensor,
    sampler: Tensor,
    offsets: Tensor,
    *,
    level: Literal["token", "sequence"],
    mode: Literal["truncate", "mask"],
    maximum: float,
    minimum: float = 0.0,
) -> Tensor:
    """Weights that correct what the sampler's arithmetic differs by from the trainer's: [T] -> fp64 [T], constants.

    rho = exp(log pi_old - log pi_sampler), of each token, or of the whole answer (their sum, for each of its tokens).
    `truncate`: min(rho, maximum), truncated importance sampling (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). `mask`: 0 where rho is not in [minimum, maximum], else rho (masked
    importance sampling: Liu et al. 2025, "When speed kills stability"). A token, or an answer, with a log-prob that
    is not finite gets 0; where that is the trainer's own the loss is not finite all the same, and its step is skipped.

    old, sampler: [T]; offsets: int64 [M + 1].
    """
    difference = old.double() - sampler.double()
    if level == "sequence":
        lengths = offsets.diff()
        numbers = difference.new_zeros(0).long() if len(lengths) == 0 else _numbers(lengths)
        sums = difference.new_zeros(len(lengths)).index_add(0, numbers, difference)
        difference = sums[numbers]
    usable = difference.isfinite()
    rho = difference.nan_to_num(0.0, 0.0, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if mode == "truncate":
        return rho.clamp(max=maximum) * usable
    return rho * ((rho >= minimum) & (rho <= maximum) & usable)


def _numbers(lengths: Tensor) -> Tensor:
    return lengths.new_ones(len(lengths)).cumsum(0).sub(1).repeat_interleave(lengths)
