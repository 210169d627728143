"""A critic's values and gradients: the same in every layout, and the same as transformers'; updates; checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from tests.distributed.critic_worker import LAYOUTS, head_weight
from tests.distributed.layouts import Layout
from tests.distributed.ranks import run_worker
from tests.distributed.test_layouts import BF16_GRADIENT, FP32_GRADIENT, largest_difference
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
    return {name: torch.load(out / f"{name}.pt") for name in ("checkpoint", *(layout.name for layout in LAYOUTS))}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_agree(layout: Layout, results: dict[str, dict[str, Any]]) -> None:
    expected = results[next(other.name for other in LAYOUTS if other.baseline == layout.baseline)]
    result, fp32 = results[layout.name], layout.settings.get("precision.dtype") != "bfloat16"
    difference, name = largest_difference(result["gradients"], expected["gradients"])
    assert difference <= (FP32_GRADIENT if fp32 else BF16_GRADIENT), name
    if fp32:
        torch.testing.assert_close(result["values"], expected["values"], rtol=0.0, atol=1e-5)
        assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
        ours, theirs = (r["updates"][0]["grad_norm"] for r in (result, expected))
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_update_lowers_the_loss(layout: Layout, results: dict[str, dict[str, Any]]) -> None:
    """The same returns three times: the third update tells the loss after two."""
    losses = [metrics["value_loss"] for metrics in results[layout.name]["updates"]]
    assert losses[0] > losses[1] > losses[2]
    expected = results["one_rank"]["updates"]
    if layout.settings.get("precision.dtype") != "bfloat16":
        assert losses == pytest.approx([metrics["value_loss"] for metrics in expected], rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_return_that_is_not_a_number_changes_nothing(layout: Layout, results: dict[str, dict[str, Any]]) -> None:
    result = results[layout.name]
    assert [metrics["skipped_updates"] for metrics in (*result["updates"], result["skipped"])] == [0, 0, 0, 1]
    assert result["left_alone"] and result["skipped"]["value_loss"] != result["skipped"]["value_loss"]


def test_a_saved_critic_goes_on_under_another_layout(results: dict[str, dict[str, Any]]) -> None:
    """Its head and its optimizer's state included: at TP2, then at PP2 with the distributed optimizer."""
    result = results["checkpoint"]
    saved, resumed = result["values"]
    assert result["step"] == 1
    torch.testing.assert_close(resumed, saved, rtol=0.0, atol=1e-5)
    ours, theirs = result["updates"]
    for metrics, expected in zip(theirs, ours, strict=True):
        assert metrics["value_loss"] == pytest.approx(expected["value_loss"], rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_a_critic_begins_with_a_policys_checkpoint(results: dict[str, dict[str, Any]]) -> None:
    """One that has log Z and an output layer, which it leaves alone; the head begins at 0."""
    result = results["checkpoint"]
    assert result["zero"]
    torch.testing.assert_close(result["from_policy"], results["one_rank"]["values"], rtol=0.0, atol=1e-5)


def test_a_critics_checkpoint_is_no_policy(results: dict[str, dict[str, Any]]) -> None:
    assert "is a critic's, which has no output layer" in results["checkpoint"]["refusal"]


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
