"""Supervised training: the likelihood of given responses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_flowrl.objectives.batch import Batch, Needs, Prepared, Rollout
from megatron_flowrl.objectives.statistics import common_statistics


@dataclass(frozen=True)
class Supervised:
    """L = - mean of log pi over all response tokens of the mini-batch."""

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    @property
    def statistics(self) -> tuple[str, ...]:
        """Mean log-prob of each sequence's tokens, and their entropy where it is computed."""
        return ("log_prob", "entropy")

    def prepare(self, rollout: Rollout) -> Prepared:
        """Nothing is constant."""
        return Prepared()

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """- sum of a sequence's log-probs / tokens of the mini-batch, [S]."""
        common = common_statistics(batch)
        losses = -batch.sum_tokens(batch.log_probs) / max(batch.num_tokens, 1)
        return losses, {name: common[name] for name in self.statistics}
