"""What an objective is given and what it answers: tensors of packed tokens and of sequences.

Letters: N response tokens in S sequences of a micro-batch, or of the part of it that a context-parallel rank holds;
M sequences with T response tokens in a whole rollout, the same on every rank.

An objective answers a loss for each sequence. The loss of a mini-batch is their sum over all of its sequences, on
whichever rank and in whichever micro-batch they are: what is averaged over is divided by inside, by counts of the
whole mini-batch. So no cut of the batch can change a loss or a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What has to be computed for an objective beside the policy's log-probs.

    old: log-probs of the policy that the answers are held to be from. Where it is false, or while the policy has not
    been updated since the rollout, they are the policy's own, without a gradient.
    """

    old: bool = False  # already for `prepare`; an importance ratio alone can do with the policy's own at first
    reference: bool = False
    entropy: Literal["none", "detached", "differentiable"] = "none"
    old_entropy: bool = False  # of the old pass, for `prepare`
    log_z: bool = False
    values: bool = False


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """All answers of a step. A response may be empty; `offsets` [M + 1] says where each one's tokens lie."""

    rewards: Tensor  # fp64 [M]
    groups: Tensor  # int64 [M]: answers to one prompt share a number
    offsets: Tensor  # int64 [M + 1]
    old_log_probs: Tensor | None = None  # [T]
    reference_log_probs: Tensor | None = None  # [T]
    old_entropy: Tensor | None = None  # [T]
    values: Tensor | None = None  # [T]: of the state before each token

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, int64 [M]."""
        return self.offsets.diff()

    @property
    def sequence_of(self) -> Tensor:
        """The response that each token belongs to, int64 [T]."""
        numbers = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return torch.repeat_interleave(numbers, self.lengths)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the tokens of each response: [T] -> fp64 [M]."""
        sums = torch.zeros(len(self.offsets) - 1, dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.sequence_of, values.double())


@dataclass(frozen=True)
class Prepared:
    """Constants that an objective has made of a rollout: by name, [M] for sequences and [T] for tokens."""

    sequences: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch. `log_probs`, `entropy` (where differentiable) and `log_z` have gradients, nothing else has."""

    log_probs: Tensor  # [N]
    old_log_probs: Tensor  # [N]
    sum_tokens: Callable[[Tensor], Tensor]  # [N] -> [S], over all ranks that hold tokens of these sequences
    sequence_of: Tensor  # int64 [N], in [0, S)
    lengths: Tensor  # [S], of whole responses, of log_probs' dtype
    num_sequences: int  # of the mini-batch
    num_tokens: int  # response tokens of the mini-batch
    reference_log_probs: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N]
    log_z: Tensor | None = None  # [S]
    sampler_weight: Tensor | None = None  # [N], of `sampler_weights`
    sequences: Mapping[str, Tensor] = field(default_factory=dict)  # [S] each, as prepared
    tokens: Mapping[str, Tensor] = field(default_factory=dict)  # [N] each

    def mean_tokens(self, values: Tensor) -> Tensor:
        """Means over the tokens of each sequence, [N] -> [S]; 0 for an empty response."""
        return self.sum_tokens(values) / self.lengths.clamp(min=1.0)

    def spread(self, values: Tensor) -> Tensor:
        """The value of its sequence for each token, [S] -> [N]."""
        return values[self.sequence_of]

    @property
    def sequence_sampler_weight(self) -> Tensor | float:
        """The sampler weight of each answer, [S]: the mean of its tokens', which at sequence level are equal."""
        if self.sampler_weight is None:
            return 1.0
        return torch.where(self.lengths > 0, self.mean_tokens(self.sampler_weight), 1.0)


class Objective(Protocol):
    """What a policy is trained on. `statistics` names what each call answers beside the loss."""

    @property
    def needs(self) -> Needs:
        """What must be there when it is called."""
        ...

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the values [S] that every call returns."""
        ...

    def prepare(self, rollout: Rollout) -> Prepared:
        """Make what is constant during the updates of a rollout: advantages, baselines. Same on every rank."""
        ...

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [S] whose sum over the mini-batch is its loss, and statistics [S], without gradients."""
        ...


def given(value: Tensor | None, what: str) -> Tensor:
    """The value; ValueError where it was not computed."""
    if value is None:
        raise ValueError(f"this objective needs {what}, which the batch is without: see its `needs`")
    return value


def group_sums(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each answer the sum over its group and the size of its group: fp64 [M] each."""
    _, number = torch.unique(groups, return_inverse=True)
    count = int(number.max()) + 1 if number.numel() else 0
    sums = torch.zeros(count, dtype=torch.float64, device=values.device).index_add(0, number, values.double())
    sizes = torch.bincount(number, minlength=count).double()
    return sums[number], sizes[number]
