"""The same loss, log-probs and gradients under every layout, and the same as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.layout_worker import NUM_SEQUENCES, sequence_loss
from tests.distributed.layouts import LAYOUTS, Layout
from tests.distributed.ranks import run_worker
from tests.tiny_models import MODELS, random_sequences, save_model

pytestmark = pytest.mark.distributed

# Largest difference over the largest element, for every tensor of a gradient.
FP32_GRADIENT = 1e-5
# bf16 keeps 8 bits: between two layouts roundings differ in every layer and in each partial sum over ranks.
BF16_GRADIENT = 0.1
BF16_LOSS = 1e-3

TRANSFORMERS_LAYOUTS = [
    next(layout for layout in LAYOUTS if layout.baseline == baseline)
    for baseline in dict.fromkeys(layout.baseline for layout in LAYOUTS)
    if baseline[2:] == ("float32", "pretrained")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_model(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every layout's results: one start of the ranks for each number of them."""
    out = tmp_path_factory.mktemp("results")
    for ranks in sorted({layout.ranks for layout in LAYOUTS}):
        run_worker("tests.distributed.layout_worker", [str(models), str(out)], ranks)
    return {layout.name: torch.load(out / f"{layout.name}.pt") for layout in LAYOUTS}


def baseline_of(layout: Layout) -> Layout:
    return next(other for other in LAYOUTS if other.baseline == layout.baseline)


def largest_difference(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert gradients.keys() == expected.keys()
    assert all(expected[name].any() and gradients[name].isfinite().all() for name in expected)
    return max(
        (((gradients[name] - expected[name]).abs().max() / expected[name].abs().max()).item(), name)
        for name in expected
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_agrees_with_one_rank(layout: Layout, results: dict[str, dict[str, Any]]) -> None:
    result, expected = results[layout.name], results[baseline_of(layout).name]
    fp32 = layout.settings.get("precision.dtype") != "bfloat16"
    difference, name = largest_difference(result["gradients"], expected["gradients"])
    assert difference <= (FP32_GRADIENT if fp32 else BF16_GRADIENT), name
    torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-6 if fp32 else BF16_LOSS, atol=0.0)
    if fp32:
        for key in ("log_probs", "entropy"):
            for ours, theirs in zip(result[key], expected[key], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_forward_only_and_training_pass_give_the_same_bits(layout: Layout, results: dict[str, dict[str, Any]]) -> None:
    """What makes the on-policy importance weight exactly 1."""
    assert results[layout.name]["passes_identical"]


@pytest.mark.parametrize("layout", TRANSFORMERS_LAYOUTS, ids=lambda layout: layout.name)
def test_one_rank_agrees_with_transformers(layout: Layout, results: dict[str, dict[str, Any]], models: Path) -> None:
    result = results[layout.name]
    model = AutoModelForCausalLM.from_pretrained(models / layout.model, dtype=torch.float32)
    log_probs, entropies = [], []
    for sequence in random_sequences(NUM_SEQUENCES, vocabulary=range(*layout.vocabulary)):
        tokens, start = torch.tensor([[*sequence.prompt, *sequence.response]]), len(sequence.prompt)
        table = torch.log_softmax(model(tokens).logits[0] / 0.8, dim=-1)[start - 1 : -1]
        log_probs.append(table.gather(1, tokens[0, start:, None]).squeeze(1))
        entropies.append(-(table.exp() * table).sum(dim=1))
    identity = torch.arange(NUM_SEQUENCES, dtype=torch.float32)
    sums, entropy_sums = (torch.stack([values.sum() for values in rows]) for rows in (log_probs, entropies))
    loss = sequence_loss(sums, entropy_sums, identity) / NUM_SEQUENCES
    loss.backward()

    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=0.0)
    for ours, theirs in zip(result["log_probs"], log_probs, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0.0, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    difference, name = largest_difference(result["gradients"], gradients)
    assert difference <= FP32_GRADIENT, name
