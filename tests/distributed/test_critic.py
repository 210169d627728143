"""A critic's values and gradients: the same in every layout, and the same as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from tests.distributed.critic_worker import LAYOUTS, head_weight
from tests.distributed.layouts import Layout
from tests.distributed.ranks import run_worker
from tests.distributed.test_layouts import FP32_GRADIENT, largest_difference
from tests.distributed.update_worker import NUM_SEQUENCES, noise
from tests.tiny_models import random_sequences, save_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("qwen2", "qwen2_tied"):
        save_model(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("results")
    for ranks in sorted({layout.ranks for layout in LAYOUTS}):
        run_worker("tests.distributed.critic_worker", [str(models), str(out)], ranks)
    return {layout.name: torch.load(out / f"{layout.name}.pt") for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_agree(layout: Layout, results: dict[str, dict[str, Any]]) -> None:
    expected = results[next(other.name for other in LAYOUTS if other.model == layout.model)]
    result = results[layout.name]
    torch.testing.assert_close(result["values"], expected["values"], rtol=0.0, atol=1e-5)
    difference, name = largest_difference(result["gradients"], expected["gradients"])
    assert difference <= FP32_GRADIENT, name
    for key, value in expected["metrics"].items():
        assert result["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_one_rank_agrees_with_transformers(results: dict[str, dict[str, Any]], models: Path) -> None:
    model = AutoModel.from_pretrained(models / "qwen2", dtype=torch.float32)
    weight, bias = head_weight(48).requires_grad_(), torch.zeros(1, requires_grad=True)
    values, losses = [], []
    for sequence in random_sequences(NUM_SEQUENCES, seed=5):
        tokens, start = torch.tensor([[*sequence.prompt, *sequence.response]]), len(sequence.prompt)
        states = model(tokens).last_hidden_state[0, start - 1 : -1]
        value = (states @ weight.T + bias).squeeze(1)
        old, returns = value.detach() + noise(sequence, 5, 0.5), noise(sequence, 6, 1.0)
        near = old + (value - old).clamp(-0.5, 0.5)
        losses.append(0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2))
        values.append(value.detach())
    loss = torch.cat(losses).mean()
    loss.backward()

    result = results["one_rank"]
    torch.testing.assert_close(result["values"], torch.cat(values), rtol=0.0, atol=1e-5)
    assert result["metrics"]["value_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    gradients = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters()}
    gradients |= {"output_layer.value.weight": weight.grad, "output_layer.value.bias": bias.grad}
    difference, name = largest_difference(result["gradients"], gradients)
    assert difference <= FP32_GRADIENT, name


def test_explained_variance_is_that_of_the_tokens(results: dict[str, dict[str, Any]]) -> None:
    returns = torch.cat([noise(s, 6, 1.0) for s in random_sequences(NUM_SEQUENCES, seed=5)])
    values = results["one_rank"]["values"]
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert results["one_rank"]["metrics"]["explained_variance"] == pytest.approx(float(expected), rel=1e-4)
