"""The mismatch of two programs' log-probs: values computed by hand, and what has no value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_flowrl.objectives.mismatch import Mismatch, mismatch, worst_token


def found(trainer: list[float], sampler: list[float], offsets: list[int]) -> Mismatch:
    return mismatch(torch.tensor(trainer), torch.tensor(sampler), offsets)


def test_by_hand() -> None:
    """Differences 0.5, -0.25, 0 in the first sequence, 1 in the second; all are exact in fp32."""
    result = found([-1.0, -2.25, -3.0, -1.0], [-1.5, -2.0, -3.0, -2.0], [0, 3, 4])
    assert result.mean_abs_diff == 1.75 / 4
    assert result.max_abs_diff == 1.0
    assert result.kl_k1 == -1.25 / 4
    k3 = (math.exp(0.5) - 1.5) + (math.exp(-0.25) - 0.75) + (math.e - 2)
    assert result.kl_k3 == pytest.approx(k3 / 4, rel=1e-14)
    assert result.sequence_ratio_mean == pytest.approx((math.exp(0.25) + math.e) / 2, rel=1e-14)
    assert result.sequence_ratio_min == pytest.approx(math.exp(0.25), rel=1e-14)
    assert result.sequence_ratio_max == pytest.approx(math.e, rel=1e-14)
    assert (result.tokens, result.sequences) == (4, 2)
    assert result.clamped_tokens == result.clamped_sequences == 0
    assert result.nonfinite_tokens == result.nonfinite_sequences == 0


def test_equal_log_probs_do_not_differ() -> None:
    values = [-0.1, -7.0, -30.0]
    result = found(values, values, [0, 1, 3])
    assert (result.mean_abs_diff, result.max_abs_diff, result.kl_k1, result.kl_k3) == (0.0, 0.0, 0.0, 0.0)
    assert math.copysign(1.0, result.kl_k1) == 1.0, "no -0.0 in a log"
    assert (result.sequence_ratio_mean, result.sequence_ratio_min, result.sequence_ratio_max) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_long_sequence_does_not_overflow(sign: int) -> None:
    """8192 tokens of ratio 1.1: the sequence's ratio is 1e339, which no float holds. Beside it, one of ratio 1."""
    trainer = torch.zeros(8193)
    sampler = torch.full((8193,), -sign * math.log(1.1))
    sampler[-1] = 0.0
    result = mismatch(trainer, sampler, [0, 8192, 8193])
    clamped = math.exp(20 * sign)
    assert result.clamped_sequences == 1 and result.clamped_tokens == 0
    assert result.sequence_ratio_mean == pytest.approx((clamped + 1) / 2, rel=1e-12)
    assert result.sequence_ratio_max == pytest.approx(max(clamped, 1.0), rel=1e-12)
    assert result.sequence_ratio_min == pytest.approx(min(clamped, 1.0), rel=1e-12)
    assert result.kl_k1 == pytest.approx(-sign * math.log(1.1) * 8192 / 8193, rel=1e-6)
    assert all(math.isfinite(value) for value in result.as_metrics().values())


def test_a_token_does_not_overflow() -> None:
    result = found([0.0, -1.0], [-1000.0, -1.0], [0, 2])
    assert result.clamped_tokens == 1 and result.clamped_sequences == 1
    assert result.max_abs_diff == 1000.0, "as it is"
    assert result.kl_k3 == pytest.approx((math.expm1(20) - 20) / 2, rel=1e-14)


def test_sums_keep_small_differences() -> None:
    """Of 100000 tokens that each differ by 2**-20, added to nothing larger; fp32 sums would drift."""
    sampler = torch.full((100_000,), -1.0)
    result = mismatch(sampler + 2**-20, sampler, [0, 100_000])
    assert result.sequence_ratio_mean == pytest.approx(math.exp(100_000 * 2**-20), rel=1e-12)


def test_sequences_without_tokens_have_the_ratio_1() -> None:
    result = found([-1.0], [-2.0], [0, 0, 1, 1])
    assert result.sequences == 3 and result.tokens == 1
    assert result.sequence_ratio_mean == pytest.approx((math.e + 2) / 3, rel=1e-14)
    assert result.sequence_ratio_min == 1.0


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_tokens_do_not_differ(offsets: list[int]) -> None:
    result = found([], [], offsets)
    assert (result.mean_abs_diff, result.max_abs_diff, result.kl_k1, result.kl_k3) == (0.0, 0.0, 0.0, 0.0)
    assert (result.sequence_ratio_mean, result.sequence_ratio_min, result.sequence_ratio_max) == (1.0, 1.0, 1.0)
    assert (result.tokens, result.sequences) == (0, len(offsets) - 1)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_counted_and_left_out(value: float) -> None:
    result = found([value, -2.0, -1.0], [-1.0, -2.5, -1.25], [0, 2, 3])
    assert result.nonfinite_tokens == 1 and result.nonfinite_sequences == 1
    assert result.mean_abs_diff == 0.75 / 2 and result.max_abs_diff == 0.5 and result.kl_k1 == -0.75 / 2
    assert result.sequence_ratio_mean == result.sequence_ratio_min == pytest.approx(math.exp(0.25), rel=1e-14)
    assert (result.tokens, result.sequences) == (3, 2)


def test_nothing_finite_is_no_agreement() -> None:
    result = found([math.nan], [-1.0], [0, 1])
    assert math.isnan(result.mean_abs_diff) and math.isnan(result.kl_k3) and math.isnan(result.sequence_ratio_mean)
    assert result.nonfinite_tokens == 1


def test_both_minus_infinity_is_not_finite() -> None:
    assert found([-math.inf, -1.0], [-math.inf, -1.0], [0, 2]).nonfinite_tokens == 1


def test_metrics_are_floats_by_the_names_of_the_fields() -> None:
    metrics = found([-1.0], [-2.0], [0, 1]).as_metrics()
    assert {"mean_abs_diff", "kl_k1", "kl_k3", "sequence_ratio_max", "tokens"} <= metrics.keys()
    assert all(type(value) is float for value in metrics.values())
    assert metrics["tokens"] == 1.0 and metrics["max_abs_diff"] == 1.0


def test_no_gradient_is_kept() -> None:
    trainer = torch.tensor([-1.0], requires_grad=True)
    assert mismatch(trainer, torch.tensor([-2.0]), (0, 1)).max_abs_diff == 1.0


@pytest.mark.parametrize(
    ("trainer", "sampler", "offsets", "says"),
    [
        ([-1.0], [-1.0, -2.0], [0, 1], r"\(1,\) \(trainer\) and \(2,\) \(sampler\)"),
        ([[-1.0]], [[-1.0]], [0, 1], r"\[tokens\]"),
        ([-1.0, -2.0], [-1.0, -2.0], [0, 1], "up to the number of tokens, 2"),
        ([-1.0, -2.0], [-1.0, -2.0], [1, 2], "from 0"),
        ([-1.0, -2.0], [-1.0, -2.0], [0, 2, 1, 2], "offsets"),
        ([], [], [], "offsets"),
    ],
)
def test_what_does_not_fit_is_refused(trainer: Any, sampler: Any, offsets: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        found(trainer, sampler, offsets)


def test_the_worst_token() -> None:
    sampler = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    assert worst_token(torch.tensor([-1.5, -3.0, -1.0, 1.0]), sampler) == 1
    assert worst_token(torch.tensor([-1.5, -3.0, math.nan, -9.0]), sampler) == 2
    assert worst_token(torch.tensor([-1.5, -3.0, -1.0, -math.inf]), sampler) == 3
    assert worst_token(torch.zeros(0), torch.zeros(0)) is None
