"""Ten optimizer steps: what overlaps communication with computation changes no bit, nor does the layout the norm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_worker
from tests.tiny_models import save_model

pytestmark = pytest.mark.distributed

_NO_CLIP = {"optimizer.clip_grad": 0.0}
_CLIP = {"optimizer.clip_grad": 0.05}  # well below the norms that occur
_GRADIENTS = {"ddp.overlap_grad_reduce": True, "ddp.bucket_size": 20000}
_WEIGHTS = {"ddp.overlap_param_gather": True}

TWO_RANKS: dict[str, dict[str, Any]] = {
    "plain": _NO_CLIP,
    "overlap_gradients": _NO_CLIP | _GRADIENTS,
    "overlap_both": _NO_CLIP | _GRADIENTS | _WEIGHTS,
    "overlap_both_reference": _NO_CLIP | _GRADIENTS | _WEIGHTS | {"reference.placement": "host"},
    "plain_clipped": _CLIP,
    "overlap_both_clipped": _CLIP | _GRADIENTS | _WEIGHTS,
    "replicated_optimizer": _NO_CLIP | {"ddp.use_distributed_optimizer": False},
    "tp2_clipped": _CLIP | {"parallel.tensor_model_parallel_size": 2},
    "tp2_sp_clipped": _CLIP | {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
    "pp2_clipped": _CLIP | {"parallel.pipeline_model_parallel_size": 2},
    "cp2_clipped": _CLIP | {"parallel.context_parallel_size": 2},
    "bf16": _NO_CLIP | {"precision.dtype": "bfloat16"},
    "bf16_overlap_both": _NO_CLIP | _GRADIENTS | _WEIGHTS | {"precision.dtype": "bfloat16"},
}

FOUR_RANKS: dict[str, dict[str, Any]] = {
    "pp2_dp2_clipped": _CLIP | {"parallel.pipeline_model_parallel_size": 2},
    "pp2_vpp2_dp2_overlap_clipped": _CLIP
    | _GRADIENTS
    | _WEIGHTS
    | {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2},
    "tp2_sp_dp2_overlap_clipped": _CLIP
    | _GRADIENTS
    | _WEIGHTS
    | {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
    "cp2_pp2_clipped": _CLIP | {"parallel.context_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2},
}


def _run(variants: dict[str, Any], ranks: int, folder: Path, models: Path) -> dict[str, dict[str, Any]]:
    named = {
        f"{model}/{name}": {"model": model, "settings": settings}
        for model in ("qwen2", "qwen2_tied")
        for name, settings in variants.items()
    }
    (folder / "variants.json").write_text(json.dumps(named))
    arguments = [str(models), str(folder / "results.pt"), str(folder / "variants.json")]
    run_worker("tests.distributed.training_worker", arguments, ranks)
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    models = tmp_path_factory.mktemp("models")
    for name in ("qwen2", "qwen2_tied"):
        save_model(name, models / name)
    one = _run({"one_rank_clipped": _CLIP}, 1, tmp_path_factory.mktemp("one"), models)
    two = _run(TWO_RANKS, 2, tmp_path_factory.mktemp("two"), models)
    return one | two | _run(FOUR_RANKS, 4, tmp_path_factory.mktemp("four"), models)


@pytest.fixture(params=["qwen2", "qwen2_tied"])
def run(request: pytest.FixtureRequest, runs: dict[str, dict[str, Any]]) -> Any:
    return lambda name: runs[f"{request.param}/{name}"]


def assert_same_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left["losses"] == right["losses"]
    assert all(torch.equal(a, b) for a, b in zip(left["log_probs"], right["log_probs"], strict=True))
    assert left["weights"].keys() == right["weights"].keys()
    assert all(torch.equal(left["weights"][name], right["weights"][name]) for name in left["weights"])


@pytest.mark.parametrize(
    "plain, overlapped",
    [
        ("plain", "overlap_gradients"),
        ("plain", "overlap_both"),
        ("plain", "overlap_both_reference"),
        ("bf16", "bf16_overlap_both"),
    ],
)
def test_overlap_gives_the_same_bits(run: Any, plain: str, overlapped: str) -> None:
    """The forward-only pass right after a step is among them: Megatron alone would give it stale weights."""
    assert run(overlapped)["buckets"] >= 4
    assert_same_bits(run(plain), run(overlapped))


def test_reference_in_host_memory_stays_what_it_was(run: Any) -> None:
    """It is exchanged with weights that were still to be gathered."""
    first, *later = run("overlap_both_reference")["reference_log_probs"]
    assert all(torch.equal(first, other) for other in later)


def test_training_moves_the_weights(run: Any) -> None:
    losses = run("plain")["losses"]
    assert losses[-1] < 0.9 * losses[0]


def test_distributed_optimizer_changes_nothing(run: Any) -> None:
    torch.testing.assert_close(run("plain")["losses"], run("replicated_optimizer")["losses"], rtol=1e-6, atol=0.0)


def test_overlap_with_clipping(run: Any) -> None:
    """Several buckets add the norm up in another order."""
    torch.testing.assert_close(
        run("plain_clipped")["losses"], run("overlap_both_clipped")["losses"], rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize(
    "layout",
    ["plain", "tp2", "tp2_sp", "pp2", "cp2", *(name.removesuffix("_clipped") for name in FOUR_RANKS)],
)
def test_gradient_norm_does_not_depend_on_the_layout(run: Any, layout: str) -> None:
    """Each parameter counts once: cut ones on every rank, copies on one."""
    expected, actual = run("one_rank_clipped"), run(f"{layout}_clipped")
    assert min(expected["grad_norms"]) > 0.05  # clipping takes part
    torch.testing.assert_close(actual["grad_norms"][0], expected["grad_norms"][0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=1e-4, atol=0.0)
