"""The sequences of a step, as far as they can be foreseen: how long answers are, and the packing plan that this gives.

Answers' lengths are log-normal, cut off at generation.max_tokens, with the mean that is asked for: their quantiles, so
that a plan has no chance in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.packing import MicroBatch, PackingRules, plan_packing

_MOST_PLANNED = 4096  # sequences of a mini-batch that are packed one by one; of more, such a sample


@dataclass(frozen=True)
class Workload:
    """Tokens of a prompt, mean tokens of an answer, both as the user says or as `assumed`."""

    prompt_tokens: int
    response_tokens: int


def assumed(config: Config, prompt_tokens: int | None, response_tokens: int | None) -> Workload:
    """What is given; else prompts of an eighth of prompts.max_tokens and answers of half of generation.max_tokens.

    Raises UserError for answers that are longer, on average, than they may be.
    """
    longest = config.generation.max_tokens
    if response_tokens is not None and response_tokens > longest:
        raise UserError(f"--response-tokens {response_tokens} is above generation.max_tokens = {longest}; lower it")
    return Workload(
        max(1, config.prompts.max_tokens // 8) if prompt_tokens is None else prompt_tokens,
        max(1, longest // 2) if response_tokens is None else response_tokens,
    )


@lru_cache(maxsize=64)
def response_lengths(count: int, mean: int, longest: int, sigma: float) -> tuple[int, ...]:
    """`count` lengths in [1, longest] with this mean, as nearly as whole numbers have it, in ascending order."""
    normal = NormalDist()
    shapes = [math.exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 0.0, float(longest) * math.exp(4 * sigma) + 1
    for _ in range(60):  # the mean of the lengths, once cut off, grows with their scale
        middle = (low + high) / 2
        found = sum(min(shape * middle, longest) for shape in shapes) / count
        low, high = (middle, high) if found < mean else (low, middle)
    return tuple(min(longest, max(1, round(shape * low))) for shape in shapes)


@dataclass(frozen=True)
class RankLoad:
    """What a data-parallel rank computes of a mini-batch: sums over its micro-batches, padding included.

    pairs: the sum of squared lengths; labels: tokens that the output layer is for.
    """

    tokens: float
    pairs: float
    labels: float
    micro_batches: int


@lru_cache(maxsize=256)
def mini_batch_load(lengths: tuple[int, ...], prompt_tokens: int, rules: PackingRules) -> RankLoad:
    """Of the busiest rank, for answers of such lengths, by the packing plan that a run would make.

    Raises SequenceTooLong.
    """
    sample, scale = _sample(lengths, rules.data_parallel_size)
    packing = plan_packing([prompt_tokens + length for length in sample], rules)
    ranks = [_load(rank, prompt_tokens) for rank in packing.mini_batches[0]]
    worst = max(ranks, key=lambda load: rules.attention_crossover * load.tokens + load.pairs)
    return RankLoad(
        worst.tokens * scale, worst.pairs * scale, worst.labels * scale, max(1, round(worst.micro_batches * scale))
    )


def _sample(lengths: tuple[int, ...], ranks: int) -> tuple[Sequence[int], float]:
    most = max(_MOST_PLANNED, ranks)
    if len(lengths) <= most:
        return lengths, 1.0
    step = len(lengths) / most
    return [lengths[int(i * step)] for i in range(most)], step


def _load(micro_batches: Sequence[MicroBatch], prompt_tokens: int) -> RankLoad:
    return RankLoad(
        tokens=sum(one.num_tokens for one in micro_batches),
        pairs=sum(length * length for one in micro_batches for length in one.padded_lengths),
        labels=sum(one.num_real_tokens - prompt_tokens * len(one.sequences) for one in micro_batches),
        micro_batches=len(micro_batches),
    )


__all__ = ["RankLoad", "Workload", "assumed", "mini_batch_load", "response_lengths"]
