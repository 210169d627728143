"""What a step trains on: answers, their rewards, and what the passes before the update say of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.model.gpt import EntropyMode
from megatron_flowrl.objectives.batch import Needs, Rollout
from megatron_flowrl.objectives.importance import sampler_weights
from megatron_flowrl.objectives.rewards import informative, overlong_penalty
from megatron_flowrl.training.passes import Listener, ScoredTokens, forward_only, gather_tokens, local_batches


@dataclass(frozen=True, kw_only=True)
class Experience:
    """M answers with T response tokens, the same on every rank; per-token tensors are end to end, in their order.

    `old` is the policy's before any update of this step; without it the first mini-batch is its own.
    """

    sequences: Sequence[TokenSequence]
    rewards: Tensor  # fp64 [M]
    groups: Tensor  # int64 [M]: answers to one prompt share a number
    sampler_log_probs: Tensor | None = None  # fp32 [T]
    old: ScoredTokens | None = None
    reference: ScoredTokens | None = None
    values: Tensor | None = None  # fp32 [T]

    def __post_init__(self) -> None:
        count = len(self.sequences)
        if self.rewards.shape != (count,) or self.groups.shape != (count,):
            raise ValueError(
                f"{count} sequences with rewards {tuple(self.rewards.shape)} and groups {tuple(self.groups.shape)}"
            )
        tokens = sum(len(sequence.response) for sequence in self.sequences)
        if self.sampler_log_probs is not None and self.sampler_log_probs.shape != (tokens,):
            raise ValueError(f"{tokens} response tokens with {tuple(self.sampler_log_probs.shape)} sampler log-probs")

    @property
    def offsets(self) -> Tensor:
        """Where each response begins, and the end: int64 [M + 1]."""
        lengths = torch.tensor([0, *(len(s.response) for s in self.sequences)], dtype=torch.int64)
        return lengths.cumsum(0)

    def rollout(self, device: torch.device) -> Rollout:
        """The objective's view of it, on the device."""

        def placed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Rollout(
            rewards=self.rewards.to(device),
            groups=self.groups.to(device),
            offsets=self.offsets.to(device),
            old_log_probs=placed(self.old.log_probs if self.old else None),
            reference_log_probs=placed(self.reference.log_probs if self.reference else None),
            old_entropy=placed(self.old.entropy if self.old else None),
            values=placed(self.values),
        )

    def sampler_weights(self, config: Config) -> Tensor | None:
        """What sampler_correction asks for: fp64 [T], or nothing."""
        settings = config.sampler_correction
        if settings.level is None:
            return None
        if self.sampler_log_probs is None or self.old is None:
            raise ValueError("sampler_correction needs the sampler's log-probs and those of the old pass")
        return sampler_weights(
            self.old.log_probs,
            self.sampler_log_probs.to(self.old.log_probs.device),
            self.offsets.to(self.old.log_probs.device),
            level=settings.level,
            mode=settings.mode,
            maximum=settings.maximum,
            minimum=settings.minimum,
        )


def gather_experience(
    sequences: Sequence[TokenSequence],
    rewards: Sequence[float],
    groups: Sequence[int],
    config: Config,
    sampler_log_probs: Sequence[Sequence[float]] | None = None,
) -> Experience:
    """Answers that are worth training on: rewards as the settings shape them, groups without differences kept or not.

    Whether a group differs is judged by the rewards as they came. Raises UserError for a reward that is not finite.
    """
    given, number = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups, dtype=torch.int64)
    wrong = [index for index, finite in enumerate(given.isfinite().tolist()) if not finite]
    if wrong:
        raise UserError(f"answer number {wrong[0] + 1} has the reward {rewards[wrong[0]]}, which is no finite number")
    kept = list(range(len(sequences)))
    if config.objective.degenerate_groups == "drop":
        kept = torch.nonzero(informative(given, number)).squeeze(1).tolist()
    if config.objective.overlong_buffer is not None:
        lengths = torch.tensor([len(sequence.response) for sequence in sequences], dtype=torch.int64)
        given = given + overlong_penalty(lengths, config.generation.max_tokens, config.objective.overlong_buffer)
    log_probs = None
    if sampler_log_probs is not None:
        log_probs = torch.tensor([value for i in kept for value in sampler_log_probs[i]], dtype=torch.float32)
    return Experience(
        sequences=[sequences[i] for i in kept],
        rewards=given[kept],
        groups=number[kept],
        sampler_log_probs=log_probs,
    )


def whole_plan(sequences: Sequence[TokenSequence], packing: PackingPlan, device: torch.device) -> list[PackedBatch]:
    """This rank's micro-batches of all mini-batches."""
    mini_batches = range(len(packing.mini_batches))
    return [batch for index in mini_batches for batch in local_batches(sequences, packing, index, device)]


def score(
    chunks: Sequence[torch.nn.Module],
    experience: Experience,
    packing: PackingPlan,
    config: Config,
    device: torch.device,
    *,
    entropy: bool = False,
    listener: Listener | None = None,
) -> ScoredTokens:
    """Log-probs, and entropies where asked for, of all response tokens under a model: one forward-only pass."""
    batches = whole_plan(experience.sequences, packing, device)
    mode: EntropyMode = "detached" if entropy else "none"
    outputs = forward_only(chunks, batches, config.log_prob, entropy=mode, listener=listener)
    return gather_tokens(experience.sequences, batches, outputs, entropy=entropy)


def with_old_pass(
    experience: Experience,
    chunks: Sequence[torch.nn.Module],
    packing: PackingPlan,
    config: Config,
    device: torch.device,
    needs: Needs,
    listener: Listener | None = None,
) -> Experience:
    """The experience with the policy's own log-probs before any update."""
    old = score(chunks, experience, packing, config, device, entropy=needs.old_entropy, listener=listener)
    return replace(experience, old=old)


def with_reference_pass(
    experience: Experience,
    chunks: Sequence[torch.nn.Module],
    packing: PackingPlan,
    config: Config,
    device: torch.device,
    listener: Listener | None = None,
) -> Experience:
    """The experience with the reference's log-probs."""
    return replace(experience, reference=score(chunks, experience, packing, config, device, listener=listener))
