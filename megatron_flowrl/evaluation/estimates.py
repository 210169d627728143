"""What n answers to each problem say: averages, pass@k, majority votes, and how sure one can be of a mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np

_RESAMPLES = 2000
_LEVEL = 0.95


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k answers is right, drawn without replacement from n of which `correct` are.

    1 - C(n - c, k) / C(n, k): the unbiased estimate of Chen et al. ("Evaluating Large Language Models Trained on Code",
    2021, equation 1). Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers with {correct} right is not defined")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(keys: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent final answer is right: maj@n.

    keys: each answer's final answer in a canonical form, None where it has none, which is no vote. Where several are
    equally frequent, the share of them that is right; 0 where nobody votes. Answers of one key are right together:
    where the grader has judged them apart, the first of them counts.
    """
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return 0.0
    first: dict[str, bool] = {}
    for key, right in zip(keys, correct, strict=True):
        if key is not None:
            first.setdefault(key, right)
    most = max(votes.values())
    return fmean(first[key] for key, count in votes.items() if count == most)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, from 2,000 resamples of `values`, one value a problem.

    So it says what other problems of the same kind might have given; a benchmark's noise is mostly that. (nan, nan) for
    no values.
    """
    if not values:
        return math.nan, math.nan
    given = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(given), size=(_RESAMPLES, len(given)))
    low, high = np.quantile(given[draws].mean(axis=1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


__all__ = ["bootstrap_interval", "majority", "pass_at_k"]
