"""An update's loss, statistics and gradients, log Z's among them: the same in every layout and cut of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.layouts import Layout
from tests.distributed.ranks import run_worker
from tests.distributed.test_layouts import FP32_GRADIENT, largest_difference
from tests.distributed.updates import LAYOUTS, OBJECTIVES
from tests.tiny_models import save_model

pytestmark = pytest.mark.distributed

HEAD = "log_z.layers.8"
# Masks of dropout go with a sequence's place in the rollout, which is another in another order.
COMPARED = [
    (layout, objective)
    for layout in LAYOUTS
    for objective in OBJECTIVES
    if not (layout.shuffle is not None and objective == "official")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every layout's results: one start of the ranks for each number of them."""
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("results")
    for name in sorted({layout.model for layout in LAYOUTS}):
        save_model(name, models / name)
    for ranks in sorted({layout.ranks for layout in LAYOUTS}):
        run_worker("tests.distributed.update_worker", [str(models), str(out)], ranks)
    return {layout.name: torch.load(out / f"{layout.name}.pt") for layout in LAYOUTS}


def baseline_of(layout: Layout) -> str:
    return next(other.name for other in LAYOUTS if other.model == layout.model)


def used(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without those of a log Z that the objective does not use.

    The last layer's bias is a single number, a sum that nearly cancels: it is measured beside its weight.
    """
    last = [gradients[f"{HEAD}.{name}"].flatten() for name in ("weight", "bias")]
    joined = {name: value for name, value in gradients.items() if not name.startswith(HEAD)} | {HEAD: torch.cat(last)}
    return {name: value for name, value in joined.items() if value.any()}


@pytest.mark.parametrize(("layout", "objective"), COMPARED, ids=lambda value: getattr(value, "name", value))
def test_layouts_agree(layout: Layout, objective: str, results: dict[str, dict[str, Any]]) -> None:
    result, expected = results[layout.name][objective], results[baseline_of(layout)][objective]
    ours, theirs = used(result["gradients"]), used(expected["gradients"])
    difference, name = largest_difference(ours, theirs)
    assert difference <= FP32_GRADIENT, name
    for key, values in expected["statistics"].items():
        torch.testing.assert_close(result["statistics"][key], values, rtol=1e-5, atol=2e-5, equal_nan=True, msg=key)
    torch.testing.assert_close(result["off_policy"]["loss"], expected["off_policy"]["loss"], rtol=1e-5, atol=1e-6)
    assert result["off_policy"].keys() == expected["off_policy"].keys()


def test_what_is_compared_is_not_nothing(results: dict[str, dict[str, Any]]) -> None:
    """Every objective has policy gradients, those with a head its own, and weights that differ from 1."""
    for objective, result in results["one_rank"].items():
        with_gradient = [name for name, gradient in result["gradients"].items() if gradient.any()]
        assert len(with_gradient) > 20
        has_head = objective in ("official", "scaled", "exact_residual_limit", "gflownet_ppo")
        assert any(name.startswith("log_z.") for name in with_gradient) == has_head
        values = result["statistics"]["weight" if "weight" in result["statistics"] else "ratio"]
        assert objective == "gflownet_ppo" or len(values.unique()) > 5


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_first_mini_batch_is_exactly_on_policy(layout: Layout, results: dict[str, dict[str, Any]]) -> None:
    """Weights of 1 and divergences of 0, to the bit, with the old pass forced and the reference's weights equal."""
    for result in results[layout.name].values():
        metrics = result["on_policy"]
        assert metrics["kl_reference"] == 0.0 and metrics["kl_old"] == 0.0
        for name in ("weight_mean", "weight_max", "weight_effective_sample_size", "ratio"):
            assert metrics.get(name, 1.0) == 1.0, name
