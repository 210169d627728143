"""The reward-maximising methods that FlowRL is compared with: a clipped ratio times an advantage.

What they differ in is where the advantage comes from and what is averaged over; each method has its name, its formula
and its paper below (`PolicyGradient.advantage`, `aggregation`, `ratio`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_flowrl.objectives.advantages import (
    discounted_sums,
    generalized_advantages,
    standardize,
    token_rewards,
)
from megatron_flowrl.objectives.batch import Batch, Needs, Prepared, Rollout, given
from megatron_flowrl.objectives.mismatch import LOG_RATIO_LIMIT
from megatron_flowrl.objectives.rewards import transform_rewards
from megatron_flowrl.objectives.statistics import COMMON, common_statistics, kl_k3

Advantage = Literal["group_norm", "group_mean", "leave_one_out", "reinforce_plus_plus", "gae"]
Ratio = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True)
class PolicyGradient:
    """L = - mean of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old, and terms below.

    advantage:
      group_norm           (r - mean) / std of the group, for every token of the answer. GRPO, Shao et al., arXiv
                           2402.03300; DAPO, Yu et al., arXiv 2503.14476 (clip_high 0.28, token_mean, no KL term)
      group_mean           r - mean of the group: GRPO without the division (Dr. GRPO, Liu et al., arXiv 2503.20783)
      leave_one_out        r - mean of the others (RLOO, Ahmadian et al., arXiv 2402.14740)
      reinforce_plus_plus  sum of the rewards from the token on, r at the last less kl_in_reward (log pi_old - log
                           pi_ref) at each, standardised over all tokens. REINFORCE++, Hu, arXiv 2501.03262
      gae                  from a critic's values, standardised over all tokens. PPO, Schulman et al., arXiv 1707.06347
    ratio: `token`; or `sequence`, the geometric mean over the answer's tokens, whose gradient every token shares.
      GSPO, Zheng et al., arXiv 2507.18071. Its logarithm is kept in [-20, 20], beyond which it has no gradient.
    aggregation: the mean over all tokens of the mini-batch, or over its sequences of the mean over their tokens.

    clip_dual c > 1: where A < 0 the loss is at most c |A| (Ye et al., arXiv 1912.09729). kl_coef times the k3 estimate
    of KL(pi || pi_ref) is added, entropy_coef times the entropy subtracted. With entropy_top_share q < 1 only the
    share q of the tokens with the highest entropy under the old policy, over the whole rollout, has an advantage
    (Wang et al., "Beyond the 80/20 rule", arXiv 2506.01939).
    """

    advantage: Advantage
    ratio: Ratio = "token"
    aggregation: Aggregation = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = math.inf
    kl_coef: float = 0.0
    kl_in_reward: float = 0.0
    entropy_coef: float = 0.0
    entropy_top_share: float = 1.0
    discount: float = 1.0
    gae_lambda: float = 1.0

    @property
    def needs(self) -> Needs:
        """Values for `gae`, the reference for either KL, entropies where tokens are chosen or rewarded by them."""
        return Needs(
            old=self.kl_in_reward > 0 or self.entropy_top_share < 1,
            reference=self.kl_coef > 0 or self.kl_in_reward > 0,
            entropy="differentiable" if self.entropy_coef else "none",
            old_entropy=self.entropy_top_share < 1,
            values=self.advantage == "gae",
        )

    @property
    def statistics(self) -> tuple[str, ...]:
        """Ratio, the share of tokens whose loss is clipped and whose ratio is out of range, mean advantage."""
        return (*COMMON, "ratio", "ratio_clipped_share", "ratio_out_of_range_share", "advantage")

    def prepare(self, rollout: Rollout) -> Prepared:
        """The tokens' advantages, and for a critic the returns that its values are trained on."""
        tokens = self._advantages(rollout)
        if self.entropy_top_share < 1:
            entropy = given(rollout.old_entropy, "the old policy's entropies")
            tokens["advantage"] = tokens["advantage"] * _highest(entropy, self.entropy_top_share)
        return Prepared(tokens=tokens)

    def _advantages(self, rollout: Rollout) -> dict[str, Tensor]:
        if self.advantage != "reinforce_plus_plus" and self.advantage != "gae":
            of_answers = transform_rewards(rollout.rewards, rollout.groups, self.advantage)
            return {"advantage": of_answers[rollout.sequence_of]}
        penalty = None
        if self.kl_in_reward > 0:
            old = given(rollout.old_log_probs, "old log-probs").double()
            penalty = self.kl_in_reward * (old - given(rollout.reference_log_probs, "reference log-probs").double())
        rewards = token_rewards(rollout.rewards, rollout.offsets, penalty)
        if self.advantage == "reinforce_plus_plus":
            return {"advantage": standardize(discounted_sums(rewards, rollout.offsets, self.discount))}
        values = given(rollout.values, "a critic's values")
        advantages, returns = generalized_advantages(
            rewards, values, rollout.offsets, discount=self.discount, gae_lambda=self.gae_lambda
        )
        return {"advantage": standardize(advantages), "return": returns}

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [S]: sums over a sequence's tokens, each divided as the aggregation says."""
        advantage = batch.tokens["advantage"].to(batch.log_probs.dtype)
        log_ratio = self._log_ratio(batch)
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        limited = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = -torch.minimum(ratio * advantage, limited * advantage)
        if math.isfinite(self.clip_dual):
            loss = torch.where(advantage < 0, torch.minimum(loss, -self.clip_dual * advantage), loss)
        clipped = (limited * advantage < ratio * advantage).to(ratio.dtype)
        if batch.sampler_weight is not None:
            loss = loss * batch.sampler_weight.to(loss.dtype)
        if self.kl_coef:
            reference = given(batch.reference_log_probs, "reference log-probs")
            loss = loss + self.kl_coef * kl_k3(batch.log_probs, reference)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * given(batch.entropy, "entropies")
        statistics = {
            "ratio": 1 + batch.mean_tokens(ratio.detach() - 1),
            "ratio_clipped_share": batch.mean_tokens(clipped),
            "ratio_out_of_range_share": batch.mean_tokens((log_ratio.detach().abs() > LOG_RATIO_LIMIT).to(ratio.dtype)),
            "advantage": batch.mean_tokens(advantage),
            **common_statistics(batch),
        }
        return self._aggregated(loss, batch), statistics

    def _log_ratio(self, batch: Batch) -> Tensor:
        log_ratio = batch.log_probs - batch.old_log_probs
        if self.ratio == "sequence":
            mean = batch.spread(batch.mean_tokens(log_ratio.detach()))
            log_ratio = mean + (batch.log_probs - batch.log_probs.detach())
        return log_ratio

    def _aggregated(self, loss: Tensor, batch: Batch) -> Tensor:
        if self.aggregation == "token_mean":
            return batch.sum_tokens(loss) / max(batch.num_tokens, 1)
        return batch.mean_tokens(loss) / batch.num_sequences


def _highest(entropy: Tensor, share: float) -> Tensor:
    """1 for the tokens with the highest entropies, else 0: fp64 [T]. Equal ones are taken or left together."""
    if entropy.numel() == 0:
        return entropy.double()
    count = max(1, round(share * entropy.numel()))
    return (entropy >= entropy.topk(count).values[-1]).double()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of a critic, the greater of the plain and the clipped one: [N].

    max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2, as in PPO's published code (Huang et al., "The 37
    implementation details of proximal policy optimization", 2022). `clip` may be infinite.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
