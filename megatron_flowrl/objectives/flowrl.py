"""FlowRL: the policy's flow is balanced against the reward's, one squared residual a sequence.

Zhu et al., "FlowRL: Matching reward distributions for LLM reasoning" (arXiv 2509.15207), after the trajectory balance
of Malkin et al. (arXiv 2201.13259).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import Batch, Needs, Prepared, Rollout, given, group_sums
from megatron_flowrl.objectives.importance import ImportanceWeight
from megatron_flowrl.objectives.rewards import RewardTransform, transform_rewards
from megatron_flowrl.objectives.statistics import COMMON, common_statistics

LengthNormalization = Literal["none", "log_probs", "residual"]
PartitionFunction = Literal["mlp", "group", "none"]
ReferencePolicy = Literal["reference", "old", "none"]


def residual(
    log_z: Tensor | float,
    log_ratio: Tensor,
    scaled_reward: Tensor,
    lengths: Tensor,
    normalization: LengthNormalization,
    exponent: float = 1.0,
) -> Tensor:
    """How far the flow is out of balance, [S].

    log_z: [S] or a number; log_ratio: sum over tokens of log pi - log pi_ref, [S]; scaled_reward: beta r, [S];
    lengths: tokens, [S]; an empty response counts as one token, of ratio 1.

    none        log Z + log_ratio - beta r                     0 where pi = pi_ref exp(beta r) / Z
    log_probs   log Z + log_ratio / |y| - beta r               0 where pi = pi_ref exp(|y| (beta r - log Z)); published
    residual    (log Z + log_ratio - beta r) / |y|^exponent    the zeros of `none`, weighed by length
    """
    tokens = lengths.clamp(min=1.0)
    if normalization == "log_probs":
        return log_z + log_ratio / tokens - scaled_reward
    balance = log_z + log_ratio - scaled_reward
    return balance / tokens**exponent if normalization == "residual" else balance


@dataclass(frozen=True)
class FlowRL:
    """L = mean over sequences of w delta^2, delta the `residual`, w the importance weight, a constant.

    `residual_limit` c makes it Huber's: c (2 |delta| - c) beyond |delta| = c, so that no sequence pulls harder than
    one at c does.

    log_z: `mlp`, learned (Batch.log_z); `none`: 0; `group`: the mean over the group's answers of
    beta r - (log pi_old - log pi_ref), in the normalisation's terms, a constant made before the update (VarGrad; an
    answer's own share of the mean takes 1 / G of its residual away, which leaves the fixed point where it is).
    reference: pi_ref, the old policy in its place, or none (then exp(beta r) / Z itself is the target).
    Of a group with equal rewards `group_norm` gives 0: it is pulled to pi_ref, and log Z to 0.
    """

    beta: float
    length_normalization: LengthNormalization = "residual"
    length_exponent: float = 1.0
    reward: RewardTransform = "raw"
    importance: ImportanceWeight = field(default_factory=ImportanceWeight)
    log_z: PartitionFunction = "mlp"
    reference: ReferencePolicy = "reference"
    residual_limit: float = math.inf

    @property
    def needs(self) -> Needs:
        """Old log-probs already for the group's log Z."""
        return Needs(
            old=self.log_z == "group", reference=self.reference == "reference", log_z=self.log_z == "mlp"
        )  # fmt: skip

    @property
    def statistics(self) -> tuple[str, ...]:
        """The residual, the weight, log Z, and how the weight was held."""
        return (*COMMON, "residual", "log_z", "weight", "weight_clipped", "log_ratio_clamped")

    def prepare(self, rollout: Rollout) -> Prepared:
        """The transformed rewards times beta, and the group's log Z where that is asked for."""
        scaled = self.beta * transform_rewards(rollout.rewards, rollout.groups, self.reward)
        constants = {"scaled_reward": scaled}
        if self.log_z == "group":
            constants["log_z"] = self._group_log_z(rollout, scaled)
        return Prepared(sequences=constants)

    def _group_log_z(self, rollout: Rollout, scaled: Tensor) -> Tensor:
        old = given(rollout.old_log_probs, "old log-probs").double()
        base = {
            "reference": lambda: given(rollout.reference_log_probs, "reference log-probs").double(),
            "old": lambda: old,
            "none": lambda: torch.zeros_like(old),
        }[self.reference]()
        log_ratio = rollout.sums(old - base)
        if self.length_normalization == "log_probs":
            log_ratio = log_ratio / rollout.lengths.clamp(min=1)
        sums, sizes = group_sums(scaled - log_ratio, rollout.groups)
        return sums / sizes

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """w delta^2 / sequences of the mini-batch, [S], times the sampler weight where there is one."""
        weight, statistics = self.importance(batch)
        log_z = self._log_z(batch)
        delta = residual(
            log_z,
            batch.sum_tokens(batch.log_probs - self._base(batch)),
            batch.sequences["scaled_reward"].to(batch.log_probs.dtype),
            batch.lengths,
            self.length_normalization,
            self.length_exponent,
        )
        squared = delta**2
        if math.isfinite(self.residual_limit):
            limit = self.residual_limit
            squared = torch.where(delta.abs() <= limit, squared, limit * (2 * delta.abs() - limit))
        statistics |= {"residual": delta.detach(), "log_z": log_z.detach(), **common_statistics(batch)}
        return weight * batch.sequence_sampler_weight * squared / batch.num_sequences, statistics

    def _base(self, batch: Batch) -> Tensor:
        if self.reference == "reference":
            return given(batch.reference_log_probs, "reference log-probs")
        return batch.old_log_probs if self.reference == "old" else torch.zeros_like(batch.log_probs)

    def _log_z(self, batch: Batch) -> Tensor:
        if self.log_z == "mlp":
            return given(batch.log_z, "log Z")
        if self.log_z == "group":
            return batch.sequences["log_z"].to(batch.log_probs.dtype)
        return torch.zeros_like(batch.lengths)
