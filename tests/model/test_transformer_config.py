"""Every setting reaches Megatron's configuration under Megatron's own name, the ones that only act on GPUs included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_flowrl.config import load_config
from megatron_flowrl.model import transformer_config as module
from megatron_flowrl.model.architecture import architecture_of
from megatron_flowrl.platform import Libraries, Platform
from tests.tiny_models import MODELS

ARCHITECTURE = architecture_of(MODELS["qwen3"])


def platform(device: str = "cuda", **libraries: Any) -> Platform:
    present = {
        "torch": "2.13.0",
        "megatron_core": "0.16.1",
        "transformer_engine": "2.9.0",
        "apex": None,
        "fused_weight_gradient": False,
        "fused_adam": "transformer_engine",
    }
    return Platform(torch.device(device), "nccl", Libraries(**(present | libraries)))


def settings(monkeypatch: pytest.MonkeyPatch, where: Platform, *overrides: str) -> dict[str, Any]:
    """What is handed to TransformerConfig, which itself refuses FP8 where Transformer Engine is missing."""
    monkeypatch.setattr(module, "TransformerConfig", lambda **given: given)
    given: Any = module.transformer_config(ARCHITECTURE, load_config(None, overrides), where)
    return given


def test_fp8_reaches_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(
        monkeypatch,
        platform(),
        "precision.fp8=hybrid",
        "precision.fp8_recipe=blockwise",
        "precision.fp8_param_gather=true",
        "precision.first_last_layers_bf16=true",
        "precision.num_layers_at_start_in_bf16=2",
        "precision.num_layers_at_end_in_bf16=1",
    )
    expected = {
        "fp8": "hybrid",
        "fp8_recipe": "blockwise",
        "fp8_param": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "num_layers_at_end_in_bf16": 1,
        "bf16": True,
        "params_dtype": torch.bfloat16,
    }
    assert given.items() >= expected.items()


def test_delayed_fp8_reaches_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(
        monkeypatch,
        platform(),
        "precision.fp8=e4m3",
        "precision.fp8_recipe=delayed",
        "precision.fp8_margin=1",
        "precision.fp8_amax_history_len=16",
        "precision.fp8_amax_compute_algo=max",
    )
    expected = {
        "fp8": "e4m3",
        "fp8_recipe": "delayed",
        "fp8_margin": 1,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
    }
    assert given.items() >= expected.items()


def test_without_fp8_nothing_of_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(key.startswith("fp8") for key in settings(monkeypatch, platform()))


@pytest.mark.parametrize("device, fused", [("cuda", True), ("cpu", False)])
def test_fusions_follow_the_platform(monkeypatch: pytest.MonkeyPatch, device: str, fused: bool) -> None:
    given = settings(monkeypatch, platform(device, fused_weight_gradient=True))
    for key in ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion"):
        assert given[key] is fused, key
    assert given["use_cpu_initialization"] is not fused


def test_weight_gradients_are_fused_only_where_apex_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, platform())["gradient_accumulation_fusion"] is False


def test_interleaved_pipeline_overlaps_its_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's rule: two stages would otherwise exchange several tensors in one batch."""
    vpp = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
    given = settings(monkeypatch, platform(), *vpp)
    assert (given["overlap_p2p_comm"], given["batch_p2p_comm"]) == (True, False)
    given = settings(monkeypatch, platform(), vpp[0])
    assert (given["overlap_p2p_comm"], given["batch_p2p_comm"]) == (False, True)


def test_every_name_is_one_of_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for overrides in (
        ["precision.fp8=hybrid", "parallel.context_parallel_size=2", "recompute.recompute_granularity=selective"],
        [
            "recompute.recompute_granularity=full",
            "recompute.recompute_method=block",
            "recompute.recompute_num_layers=1",
        ],
    ):
        names |= settings(monkeypatch, platform(), *overrides).keys()
    assert names <= TransformerConfig.__dataclass_fields__.keys()
    assert {"recompute_modules", "recompute_num_layers", "cp_comm_type"} <= names


def test_architecture_reaches_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(monkeypatch, platform("cpu"))
    expected = {
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "qk_layernorm": True,
        "add_qkv_bias": False,
        "layernorm_epsilon": 1e-6,
        "calculate_per_token_loss": True,
    }
    assert given.items() >= expected.items()


def test_start_up_line_names_every_implementation() -> None:
    line = platform(fused_weight_gradient=True).describe()
    for part in ("layers transformer_engine 2.9.0", "optimizer transformer_engine FusedAdam", "weight gradient apex"):
        assert part in line
    assert "optimizer apex FusedAdam" in platform(fused_adam="apex", apex="0.1").describe()
    assert "layers torch, optimizer torch AdamW, fused weight gradient off" in platform("cpu").describe()
