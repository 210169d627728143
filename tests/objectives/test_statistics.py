"""What is logged: divergences, means of sequences, the effective sample size, and the numbers made of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import Prepared
from megatron_flowrl.objectives.statistics import (
    COMMON,
    common_statistics,
    effective_sample_size,
    kl_k3,
    summarize,
)
from tests.objectives.ragged import make_ragged


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_divergence_by_hand() -> None:
    found = kl_k3(double([-1.0, -1.0, -1.0]), double([-1.0, -0.5, -2.0])).tolist()
    assert found == pytest.approx([0.0, math.exp(0.5) - 1.5, math.exp(-1.0)], rel=1e-14)


def test_the_divergence_of_equals_is_exactly_zero_and_never_below() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 - 5
    assert not kl_k3(values, values).any()
    assert (kl_k3(values, values + 1e-4 * values) >= 0).all(), "in fp32, where exp(d) - 1 - d would be rounded below 0"


def test_the_divergence_is_that_of_the_distributions() -> None:
    """Enumerated: the mean over the first of k3 is KL(first || other)."""
    first, other = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
    expected = (first.exp() * (first - other)).sum()
    torch.testing.assert_close((first.exp() * kl_k3(first, other)).sum(), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_divergence_does_not_overflow(sign: int) -> None:
    log_probs = torch.zeros(1, requires_grad=True)
    found = kl_k3(log_probs, torch.full((1,), 1000.0 * sign))
    found.sum().backward()
    assert found.item() == pytest.approx(math.expm1(20.0 * sign) - 20.0 * sign, rel=1e-6)
    assert log_probs.grad is not None and log_probs.grad.isfinite().all()


def test_sequences_have_the_means_of_their_tokens() -> None:
    ragged = make_ragged()
    members = range(len(ragged.lengths))
    found = common_statistics(ragged.batch(Prepared(), members))
    assert found.keys() == set(COMMON) and not any(values.requires_grad for values in found.values())
    policy, old, reference, entropy = (
        values.tolist() for values in (ragged.log_probs, ragged.old, ragged.reference, ragged.entropy)
    )
    for index in members:
        tokens, length = ragged.tokens_of(index), ragged.lengths[index] or 1
        to_old, to_reference = ([other[t] - policy[t] for t in tokens] for other in (old, reference))
        wanted = {
            "log_prob": math.fsum(policy[t] for t in tokens),
            "reference_log_prob": math.fsum(reference[t] for t in tokens),
            "entropy": math.fsum(entropy[t] for t in tokens),
            "kl_old": math.fsum(math.exp(-d) - 1 + d for d in to_old),  # of the old policy to this one
            "kl_reference": math.fsum(math.exp(d) - 1 - d for d in to_reference),
        }
        for name, total in wanted.items():
            assert float(found[name][index]) == pytest.approx(total / length, rel=1e-12, abs=1e-15)


def test_what_is_not_known_is_nan() -> None:
    batch = replace(make_ragged().batch(Prepared(), [0, 1, 2]), reference_log_probs=None, entropy=None)
    found = common_statistics(batch)
    unknown = {"reference_log_prob", "kl_reference", "entropy"}
    assert {name for name, values in found.items() if values.isnan().all()} == unknown
    assert all(found[name].shape == (3,) for name in COMMON)


@pytest.mark.parametrize(
    ("weights", "share"),
    [([1.0, 1.0, 1.0, 1.0], 1.0), ([3.0, 0.0, 0.0, 0.0], 0.25), ([2.0, 2.0, 0.0, 0.0], 0.5), ([1.0, 3.0], 0.8)],
)
def test_the_effective_sample_size_by_hand(weights: list[float], share: float) -> None:
    assert effective_sample_size(double(weights)).item() == pytest.approx(share, rel=1e-14)
    assert effective_sample_size(7 * double(weights)).item() == pytest.approx(share, rel=1e-14)


def test_a_summary_by_hand() -> None:
    given = {
        "residual": [1.0, -3.0, 0.5],
        "weight": [1.0, 3.0, 2.0],
        "weight_clipped": [0.0, 1.0, 0.0],
        "log_ratio_clamped": [1.0, 1.0, 0.0],
        "log_z": [1.0, 2.0, 6.0],
        "log_prob": [-1.0, -2.0, -6.0],
        "mine": [0.5, 0.25, 0.0],
    }
    found = summarize({name: torch.tensor(values) for name, values in given.items()})
    assert found == pytest.approx(
        {
            "residual_mean": -0.5,
            "residual_abs": 1.5,
            "residual_abs_max": 3.0,
            "weight_mean": 2.0,
            "weight_max": 3.0,
            "weight_effective_sample_size": 36 / (3 * 14),
            "weight_clipped_share": 1 / 3,
            "log_ratio_clamped": 2.0,
            "log_z_mean": 3.0,
            "log_z_std": math.sqrt(14 / 3),
            "log_prob": -3.0,
            "mine": 0.25,
        },
        rel=1e-14,
    )
    assert all(type(value) is float for value in found.values())


def test_a_summary_leaves_out_what_is_unknown_throughout() -> None:
    """One NaN among values is shown: something is wrong with that sequence."""
    found = summarize({"entropy": double([math.nan] * 2), "residual": double([math.nan] * 2), "a": double([1.0, 2.0])})
    assert found == {"a": 1.5}
    assert math.isnan(summarize({"a": double([1.0, math.nan])})["a"])


def test_a_summary_of_nothing_is_empty() -> None:
    assert summarize({}) == {} and summarize({"weight": double([]), "log_z": double([]), "a": double([])}) == {}


def test_a_summary_of_one_sequence_is_finite() -> None:
    found = summarize({"log_z": double([2.0]), "weight": double([0.5]), "residual": double([-1.0])})
    assert found["log_z_std"] == 0.0 and found["weight_effective_sample_size"] == 1.0
    assert found["residual_abs"] == 1.0


def test_a_summary_of_fp32_is_made_in_fp64() -> None:
    """Weights of exp(20), whose squares fp32 rounds."""
    weights = torch.tensor([math.exp(20), 1.0, 1.0])
    exact = (float(weights[0]) + 2) ** 2 / (3 * (float(weights[0]) ** 2 + 2))
    assert summarize({"weight": weights})["weight_effective_sample_size"] == pytest.approx(exact, rel=1e-14)
