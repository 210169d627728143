"""A trajectory balance beside a clipped policy gradient: the joint loss that the FlowRL paper compares with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_flowrl.objectives.batch import Batch, Needs, Prepared, Rollout
from megatron_flowrl.objectives.flowrl import FlowRL
from megatron_flowrl.objectives.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class GFlowNetPPO:
    """L = L_policy_gradient + coefficient L_balance (Zhang et al., 2025, as the FlowRL paper's ablation names it).

    Only what that ablation says of the method was at hand. The balance is FlowRL's as it is set; by default w = 1, as
    PPO's part has a ratio of its own.
    """

    policy_gradient: PolicyGradient
    balance: FlowRL
    coefficient: float = 1.0

    @property
    def needs(self) -> Needs:
        """What either of the two needs."""
        one, other = self.policy_gradient.needs, self.balance.needs
        return Needs(
            old=one.old or other.old,
            reference=one.reference or other.reference,
            entropy=one.entropy,
            old_entropy=one.old_entropy,
            log_z=other.log_z,
            values=one.values,
        )

    @property
    def statistics(self) -> tuple[str, ...]:
        """Those of both."""
        return tuple(dict.fromkeys((*self.policy_gradient.statistics, *self.balance.statistics)))

    def prepare(self, rollout: Rollout) -> Prepared:
        """The constants of both."""
        one, other = self.policy_gradient.prepare(rollout), self.balance.prepare(rollout)
        return Prepared({**one.sequences, **other.sequences}, {**one.tokens, **other.tokens})

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, [S], and the statistics of both."""
        loss, statistics = self.policy_gradient(batch)
        balance, more = self.balance(batch)
        return loss + self.coefficient * balance, statistics | more
