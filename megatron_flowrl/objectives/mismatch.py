"""How far the sampler's log-probs are from the trainer's, for tokens that the sampler has drawn.

The two programs compute the same distribution in different ways; what they differ by is what an importance ratio
corrects, or, where it is not corrected, what biases the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: past it a mean says only that something is wrong, and the counts say that too


@dataclass(frozen=True)
class Mismatch:
    """What `mismatch` finds; differences are in nats.

    Means over tokens are 0, and ratios are 1, where there is nothing to differ: no tokens, or no sequences. They are
    NaN where there is something, and none of it is finite.
    """

    mean_abs_diff: float  # of |trainer - sampler| over tokens
    max_abs_diff: float
    kl_k1: float  # mean of sampler - trainer: the k1 estimate of KL(sampler || trainer); its sign may be either
    kl_k3: float  # mean of exp(d) - 1 - d, d = trainer - sampler: the k3 estimate of the same, never below 0
    sequence_ratio_mean: float  # of exp(sum of trainer - sampler) over sequences
    sequence_ratio_min: float
    sequence_ratio_max: float
    clamped_tokens: int  # whose d was clamped to [-20, 20] for kl_k3
    clamped_sequences: int  # whose sum was clamped to [-20, 20] for the ratios
    nonfinite_tokens: int  # with a log-prob that is infinite or NaN on either side: in none of the token means
    nonfinite_sequences: int  # with such a token: in none of the ratios
    tokens: int
    sequences: int

    def as_metrics(self) -> dict[str, float]:
        """Every field by its name, as a float: what is logged at each step."""
        return {name: float(value) for name, value in asdict(self).items()}


def mismatch(trainer: Tensor, sampler: Tensor, offsets: Sequence[int]) -> Mismatch:
    """Compare log-probs of the same tokens, sequence after sequence.

    trainer, sampler: fp32 [tokens], on one device; offsets: [sequences + 1], where each sequence's tokens begin, and
    the end. A sequence without tokens has the ratio 1. Everything is computed in fp64, without gradients.

    Raises ValueError for shapes that differ, or offsets that do not go from 0 up to the number of tokens.
    """
    _check(trainer, sampler, offsets)
    difference = (trainer.detach().double() - sampler.detach().double()).flatten()
    finite = difference.isfinite()  # infinite - infinite is NaN
    used = difference[finite]
    clamped = used.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    bounds = torch.tensor(list(offsets), dtype=torch.int64, device=difference.device)
    sequences = len(offsets) - 1
    sequence_of = torch.repeat_interleave(torch.arange(sequences, device=bounds.device), bounds.diff())
    nothing = torch.zeros(sequences, dtype=torch.float64, device=difference.device)
    sums = nothing.index_add(0, sequence_of, difference.where(finite, 0.0))
    whole = nothing.index_add(0, sequence_of, (~finite).double()) == 0
    log_ratios = sums[whole]
    ratios = log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    without_tokens, without_sequences = _default(difference, 0.0), _default(sums, 1.0)
    values = (
        _mean(used.abs(), without_tokens),
        used.abs().max() if used.numel() else without_tokens,
        -_mean(used, without_tokens),
        _mean(clamped.expm1() - clamped, without_tokens),
        _mean(ratios, without_sequences),
        ratios.min() if ratios.numel() else without_sequences,
        ratios.max() if ratios.numel() else without_sequences,
    )
    counts = (
        (used.abs() > LOG_RATIO_LIMIT).sum(),
        (log_ratios.abs() > LOG_RATIO_LIMIT).sum(),
        (~finite).sum(),
        (~whole).sum(),
    )
    # One transfer from the device. Counts are exact in fp64.
    found = torch.stack([*values, *(count.double() for count in counts)]).tolist()
    return Mismatch(
        mean_abs_diff=found[0],
        max_abs_diff=found[1],
        kl_k1=found[2] + 0.0,  # -0.0 is 0
        kl_k3=found[3],
        sequence_ratio_mean=found[4],
        sequence_ratio_min=found[5],
        sequence_ratio_max=found[6],
        clamped_tokens=int(found[7]),
        clamped_sequences=int(found[8]),
        nonfinite_tokens=int(found[9]),
        nonfinite_sequences=int(found[10]),
        tokens=difference.numel(),
        sequences=sequences,
    )


def worst_token(trainer: Tensor, sampler: Tensor) -> int | None:
    """Where in the packed tokens the log-probs, fp32 [tokens], differ most; None where there are no tokens.

    One that is not finite counts as the largest difference; of equal ones the first.
    """
    if trainer.numel() == 0:
        return None
    difference = (trainer.detach().double() - sampler.detach().double()).abs()
    return int(difference.nan_to_num(nan=math.inf, posinf=math.inf).argmax())


def _check(trainer: Tensor, sampler: Tensor, offsets: Sequence[int]) -> None:
    if trainer.dim() != 1 or trainer.shape != sampler.shape:
        raise ValueError(
            f"log-probs of {tuple(trainer.shape)} (trainer) and {tuple(sampler.shape)} (sampler) tokens: they must be "
            "of the same tokens, [tokens]"
        )
    ascending = all(start <= stop for start, stop in zip(offsets, list(offsets)[1:], strict=False))
    if not offsets or offsets[0] != 0 or offsets[-1] != trainer.numel() or not ascending:
        shown = f"{list(offsets)[:6]}{'...' if len(offsets) > 6 else ''}"
        raise ValueError(f"offsets {shown} must go from 0 up to the number of tokens, {trainer.numel()}")


def _default(over: Tensor, nothing: float) -> Tensor:
    """The value of a statistic over no usable part of `over`."""
    return over.new_tensor(math.nan if over.numel() else nothing)


def _mean(values: Tensor, default: Tensor) -> Tensor:
    return values.mean() if values.numel() else default
