"""Advantages of tokens: by hand, and against sums written out; nothing leaks from one answer into another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_flowrl.objectives.advantages import (
    discounted_sums,
    generalized_advantages,
    standardize,
    token_rewards,
)
from tests.objectives.ragged import make_ragged

DISCOUNTS = [(1.0, 1.0), (0.9, 1.0), (1.0, 0.8), (0.9, 0.5), (0.9, 0.0), (0.0, 1.0)]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_reward_is_given_at_the_last_token() -> None:
    """Of answers of 2, 0, 1 and 3 tokens; the empty one's is nowhere."""
    offsets = torch.tensor([0, 2, 2, 3, 6])
    rewards = double([1.0, 100.0, 2.0, 3.0])
    assert token_rewards(rewards, offsets).tolist() == [0.0, 1.0, 2.0, 0.0, 0.0, 3.0]
    less = token_rewards(rewards, offsets, double([0.5, 0.25, 0.0, -1.0, 0.0, 1.0]))
    assert less.tolist() == [-0.5, 0.75, 2.0, 1.0, 0.0, 2.0]


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_no_tokens_have_no_advantages(offsets: list[int]) -> None:
    places, none = torch.tensor(offsets), torch.zeros(0, dtype=torch.float64)
    assert token_rewards(double([1.0] * (len(offsets) - 1)), places, none).shape == (0,)
    assert discounted_sums(none, places, 0.9).shape == (0,)
    advantages, returns = generalized_advantages(none, none, places, discount=0.9, gae_lambda=0.9)
    assert advantages.shape == returns.shape == standardize(none).shape == (0,)


def test_discounted_sums_by_hand() -> None:
    """8, 4, 2 at 1/2 in an answer of three; the answers beside it are their own."""
    found = discounted_sums(double([1.0, 8.0, 4.0, 2.0, -1.0]), torch.tensor([0, 1, 4, 4, 5]), 0.5)
    assert found.tolist() == [1.0, 10.5, 5.0, 2.0, -1.0]


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_discounted_sums_are_the_double_sum(discount: float, seed: int) -> None:
    ragged = make_ragged(seed)
    given = ragged.values.clone()
    found = discounted_sums(ragged.values, ragged.offsets, discount).tolist()
    for index in range(len(ragged.lengths)):
        tokens = ragged.tokens_of(index)
        for t in tokens:
            wanted = math.fsum(discount ** (k - t) * float(given[k]) for k in range(t, tokens.stop))
            assert found[t] == pytest.approx(wanted, rel=1e-12, abs=1e-14)
    assert torch.equal(ragged.values, given)


def test_generalized_advantages_by_hand() -> None:
    """d = 0.8, 0.7, 7; each adds 0.45 of the next one's advantage. Beside it an answer of one token."""
    rewards, values = double([0.0, 0.0, 10.0, 4.0]), double([1.0, 2.0, 3.0, 1.5])
    advantages, returns = generalized_advantages(
        rewards, values, torch.tensor([0, 3, 3, 4]), discount=0.9, gae_lambda=0.5
    )
    assert advantages.tolist() == pytest.approx([2.5325, 3.85, 7.0, 2.5], rel=1e-14)
    assert returns.tolist() == pytest.approx([3.5325, 5.85, 10.0, 4.0], rel=1e-14)


@pytest.mark.parametrize(("discount", "gae_lambda"), DISCOUNTS)
@pytest.mark.parametrize("seed", range(3))
def test_generalized_advantages_are_the_double_sum(discount: float, gae_lambda: float, seed: int) -> None:
    """Equation 16 of Schulman et al.: A_t = sum over l of (discount lambda)^l d_(t + l)."""
    ragged = make_ragged(seed)
    rewards = token_rewards(ragged.rollout.rewards, ragged.offsets, ragged.reference - ragged.old)
    given = (rewards.clone(), ragged.values.clone())
    found, returns = generalized_advantages(
        rewards, ragged.values, ragged.offsets, discount=discount, gae_lambda=gae_lambda
    )
    reward, value = rewards.tolist(), ragged.values.tolist()
    for index in range(len(ragged.lengths)):
        tokens = ragged.tokens_of(index)
        for t in tokens:
            wanted = 0.0
            for k in range(t, tokens.stop):
                following = value[k + 1] if k + 1 < tokens.stop else 0.0
                wanted += (discount * gae_lambda) ** (k - t) * (reward[k] + discount * following - value[k])
            assert float(found[t]) == pytest.approx(wanted, rel=1e-12, abs=1e-13)
            assert float(returns[t]) == pytest.approx(wanted + value[t], rel=1e-12, abs=1e-13)
    assert torch.equal(rewards, given[0]) and torch.equal(ragged.values, given[1])


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_returns_at_lambda_1_are_what_came_after(discount: float) -> None:
    """Whatever the critic says: they are what it learns."""
    ragged = make_ragged()
    rewards = token_rewards(ragged.rollout.rewards, ragged.offsets)
    _, returns = generalized_advantages(rewards, ragged.values, ragged.offsets, discount=discount, gae_lambda=1.0)
    torch.testing.assert_close(returns, discounted_sums(rewards, ragged.offsets, discount), rtol=0.0, atol=1e-12)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    ragged = make_ragged()
    rewards = token_rewards(ragged.rollout.rewards, ragged.offsets)
    values = discounted_sums(rewards, ragged.offsets, 0.9)
    for gae_lambda in (0.0, 0.5, 1.0):
        found, _ = generalized_advantages(rewards, values, ragged.offsets, discount=0.9, gae_lambda=gae_lambda)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0.0, atol=1e-14)


def test_fp32_values_are_summed_in_fp64() -> None:
    """A sum of 2^24 and then ones, which fp32 would not see."""
    values = torch.ones(5)
    values[-1] = 2.0**24
    assert discounted_sums(values, torch.tensor([0, 5]), 1.0).tolist() == [2.0**24 + back for back in (4, 3, 2, 1, 0)]


def test_standardized_values_have_mean_0_and_spread_1() -> None:
    found = standardize(make_ragged().values)
    assert found.dtype == torch.float64
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-14)
    assert float(found.square().mean()) == pytest.approx(1.0, rel=1e-7)
    assert standardize(double([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0], rel=1e-7)


@pytest.mark.parametrize("value", [0.7, 0.1, -3e7])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_standardized_equal_values_are_exactly_zero(value: float, count: int) -> None:
    assert not standardize(torch.full((count,), value, dtype=torch.float64)).any()
    assert not standardize(torch.full((count,), value)).any()
