"""What a critic's metrics say of values and returns; its gradients and updates are in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_flowrl.training.critic import critic_metrics


def metrics_of(values: Tensor, returns: Tensor) -> dict[str, float]:
    """As `Critic.update` has them: fp32 sums over the 40 tokens of each sequence."""
    error = (returns - values).float().view(-1, 40)
    sums = {
        "loss": (0.5 * error**2).sum(1) / len(returns),
        "value": values.float().view(-1, 40).sum(1),
        "error": error.sum(1),
        "squared_error": (error**2).sum(1),
        "clipped": torch.zeros(len(error)),
    }
    return critic_metrics({name: tensor.double() for name, tensor in sums.items()}, returns)


def draw(seed: int) -> Tensor:
    return torch.randn(2000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 10.0, -100.0])
def test_explained_variance_does_not_depend_on_where_the_returns_are(offset: float) -> None:
    returns, values = offset + 0.1 * draw(0), offset + 0.08 * draw(0) + 0.03 * draw(1)
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    metrics = metrics_of(values, returns)
    assert metrics["explained_variance"] == pytest.approx(float(expected), abs=1e-4)
    assert metrics["return_mean"] == pytest.approx(float(returns.mean()), rel=1e-12)
    assert metrics["value_loss"] == pytest.approx(float(0.5 * ((returns - values) ** 2).mean()), rel=1e-3)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_equal_returns_have_no_variance_to_explain(reward: float) -> None:
    """What GAE makes of equal rewards is equal to a rounding: A + V, where A was reward - V."""
    values = 0.3 + 0.05 * draw(0)
    returns = (reward - values) + values
    assert metrics_of(values, returns)["explained_variance"] == 0.0


def test_values_that_are_not_numbers_do_not_end_the_run() -> None:
    metrics = metrics_of(torch.full((2000,), float("nan")), torch.ones(2000, dtype=torch.float64))
    assert metrics["value_loss"] != metrics["value_loss"]
