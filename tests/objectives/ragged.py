"""Random ragged answers in fp64, whole or cut into micro-batches, and what an objective makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import Batch, Objective, Prepared, Rollout

EQUAL_GROUP, LONE_GROUP = 20, 3  # numbers of the group whose rewards are all 0.7, and of a group of one answer


@dataclass(kw_only=True)
class Ragged:
    """A rollout that is one mini-batch too. The first three tensors have gradients."""

    log_probs: Tensor  # [T]
    entropy: Tensor  # [T]
    log_z: Tensor  # [M]
    old: Tensor  # [T], and so are the next four
    reference: Tensor
    old_entropy: Tensor
    values: Tensor
    sampler_weight: Tensor | None = None
    lengths: list[int]
    rewards: list[float]
    groups: list[int]

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def rollout(self) -> Rollout:
        return Rollout(
            rewards=torch.tensor(self.rewards, dtype=torch.float64),
            groups=torch.tensor(self.groups, dtype=torch.int64),
            offsets=self.offsets,
            old_log_probs=self.old,
            reference_log_probs=self.reference,
            old_entropy=self.old_entropy,
            values=self.values,
        )

    def tokens_of(self, index: int) -> range:
        """Where the tokens of an answer lie."""
        start = sum(self.lengths[:index])
        return range(start, start + self.lengths[index])

    def group_of(self, index: int) -> list[int]:
        """The answers to the same prompt, with the answer itself."""
        return [other for other, group in enumerate(self.groups) if group == self.groups[index]]

    def batch(self, prepared: Prepared, members: Sequence[int]) -> Batch:
        """A micro-batch of these answers, in this order."""
        places = torch.tensor([place for index in members for place in self.tokens_of(index)], dtype=torch.int64)
        numbers = torch.tensor(members, dtype=torch.int64)
        lengths = torch.tensor([self.lengths[index] for index in members], dtype=torch.int64)
        sequence_of = torch.arange(len(members)).repeat_interleave(lengths)
        return Batch(
            log_probs=self.log_probs[places],
            old_log_probs=self.old[places],
            reference_log_probs=self.reference[places],
            entropy=self.entropy[places],
            log_z=self.log_z[numbers],
            sampler_weight=None if self.sampler_weight is None else self.sampler_weight[places],
            sum_tokens=lambda values: values.new_zeros(len(members)).index_add(0, sequence_of, values),
            sequence_of=sequence_of,
            lengths=lengths.to(self.log_probs.dtype),
            num_sequences=len(self.lengths),
            num_tokens=sum(self.lengths),
            sequences={name: values[numbers] for name, values in prepared.sequences.items()},
            tokens={name: values[places] for name, values in prepared.tokens.items()},
        )


def make_ragged(seed: int = 0, *, sampler_weight: bool = False) -> Ragged:
    """Answers of 0, 1 and up to 9 tokens; groups of 1, 2, 4 (equal rewards), 3 (0 or 1) and 5, in any order."""
    drawn = random.Random(seed)
    answers = [(LONE_GROUP, drawn.random())]
    answers += [(7, drawn.gauss(0.0, 1.0)) for _ in range(2)] + [(EQUAL_GROUP, 0.7)] * 4
    answers += [(0, 0.0), (0, 1.0), (0, 1.0)] + [(11, drawn.gauss(0.0, 1.0)) for _ in range(5)]
    drawn.shuffle(answers)
    lengths = [0, 1, 1, *(drawn.randint(0, 9) for _ in answers[3:])]
    drawn.shuffle(lengths)
    generator = torch.Generator().manual_seed(seed)

    def draw(centre: float, scale: float, count: int = sum(lengths)) -> Tensor:
        return centre + scale * torch.randn(count, generator=generator, dtype=torch.float64)

    log_probs = draw(-2.0, 0.5)
    return Ragged(
        log_probs=log_probs.clone().requires_grad_(),
        entropy=draw(2.0, 0.5).requires_grad_(),
        log_z=draw(0.5, 1.0, len(lengths)).requires_grad_(),
        old=log_probs + draw(0.0, 0.3),
        reference=log_probs + draw(0.1, 0.4),
        old_entropy=draw(2.0, 0.5),
        values=draw(0.3, 0.5),
        sampler_weight=draw(0.8, 0.5).clamp(min=0.0) if sampler_weight else None,
        lengths=lengths,
        rewards=[reward for _, reward in answers],
        groups=[group for group, _ in answers],
    )


def long_answer(ratio: Tensor, *, dtype: torch.dtype = torch.float32, reward: float = 1.0) -> Ragged:
    """One answer whose tokens have these ratios pi / pi_old = pi / pi_ref, [T]; beside it one of a token of ratio 1."""
    difference = torch.cat([ratio.double().log(), torch.zeros(1, dtype=torch.float64)]).to(dtype)
    log_probs = torch.full_like(difference, -1.0)
    zeros = torch.zeros_like(difference)
    return Ragged(
        log_probs=log_probs.clone().requires_grad_(),
        entropy=zeros.clone().requires_grad_(),
        log_z=torch.zeros(2, dtype=dtype, requires_grad=True),
        old=log_probs - difference,
        reference=log_probs - difference,
        old_entropy=zeros,
        values=zeros,
        lengths=[len(ratio), 1],
        rewards=[reward, 1.0 - reward],
        groups=[0, 0],
    )


@dataclass(kw_only=True)
class Outcome:
    """A mini-batch's loss and its gradients; values of its sequences, in the order of the micro-batches."""

    loss: Tensor
    by_log_probs: Tensor
    by_entropy: Tensor
    by_log_z: Tensor
    statistics: dict[str, Tensor]


def outcome(objective: Objective, ragged: Ragged, cut: Sequence[Sequence[int]] | None = None) -> Outcome:
    """What the objective makes of all answers, as one micro-batch or as several."""
    prepared = objective.prepare(ragged.rollout)
    micro_batches = [list(range(len(ragged.lengths)))] if cut is None else cut
    answers = [objective(ragged.batch(prepared, members)) for members in micro_batches]
    for (losses, found), members in zip(answers, micro_batches, strict=True):
        assert found.keys() == set(objective.statistics) and losses.shape == (len(members),)
        assert all(values.shape == losses.shape and not values.requires_grad for values in found.values())
    loss = torch.stack([losses.sum() for losses, _ in answers]).sum()
    wanted = (ragged.log_probs, ragged.entropy, ragged.log_z)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return Outcome(
        loss=loss.detach(),
        by_log_probs=gradients[0],
        by_entropy=gradients[1],
        by_log_z=gradients[2],
        statistics={name: torch.cat([found[name] for _, found in answers]) for name in objective.statistics},
    )


@dataclass
class Expected:
    """The same numbers, found by a plain loop."""

    loss: float
    by_log_probs: list[float]
    by_entropy: list[float]
    by_log_z: list[float]

    @classmethod
    def nothing(cls, ragged: Ragged) -> Expected:
        tokens = sum(ragged.lengths)
        return cls(0.0, [0.0] * tokens, [0.0] * tokens, [0.0] * len(ragged.lengths))


def assert_as_expected(found: Outcome, expected: Expected, what: object, tolerance: float = 1e-10) -> None:
    """Loss and gradients; `what` is said where they differ."""
    for name, wanted in vars(expected).items():
        torch.testing.assert_close(
            getattr(found, name),
            torch.tensor(wanted, dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
            msg=partial("{} with {}: {}".format, name, what),
        )


def assert_no_cut_matters(objective: Objective, ragged: Ragged, seed: int) -> None:
    """Any micro-batches, empty ones among them, have together the whole's loss, gradients and statistics."""
    whole = outcome(objective, ragged)
    drawn = random.Random(seed)
    order = drawn.sample(range(len(ragged.lengths)), len(ragged.lengths))
    ends = sorted(drawn.choices(range(len(order) + 1), k=4))
    pieces = [order[start:end] for start, end in zip([0, *ends], [*ends, len(order)], strict=True)]
    for cut in ([[index] for index in order], pieces, [[], order, []]):
        found = outcome(objective, ragged, cut)
        for name in ("loss", "by_log_probs", "by_entropy", "by_log_z"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
        for name, values in found.statistics.items():
            torch.testing.assert_close(values, whole.statistics[name][order], rtol=1e-12, atol=1e-14, equal_nan=True)
