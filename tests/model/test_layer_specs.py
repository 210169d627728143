"""Our layers have the checkpoint keys, shapes, dtypes and parallel marks of Megatron's Transformer Engine layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import architecture_of
from megatron_flowrl.model.build import build_parallel_model
from megatron_flowrl.model.gpt import LanguageModel
from megatron_flowrl.platform import Platform

RECORD = json.loads((Path(__file__).parent / "transformer_engine_layers.json").read_text())["models"]

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2_tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2_untied": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "llama": LlamaConfig(**_SIZES),
}


@pytest.fixture(params=sorted(RECORD))
def case(request: pytest.FixtureRequest, one_rank_platform: Platform) -> tuple[LanguageModel, dict[str, list[str]]]:
    architecture = architecture_of(CONFIGS[request.param])
    model = build_parallel_model(architecture, Config(), one_rank_platform).modules[0]
    return model, RECORD[request.param]


def _lines(sharded: dict[str, Any]) -> set[str]:
    lines = set()
    for entry in sharded.values():
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(part, ShardedTensor):
                lines.add(f"{part.key} ShardedTensor {list(part.global_shape)} {part.dtype}")
            elif isinstance(part, ShardedObject):
                lines.add(f"{part.key} ShardedObject {list(part.global_shape)}")
    return lines


def test_checkpoint_entries(case: tuple[LanguageModel, dict[str, list[str]]]) -> None:
    model, record = case
    assert sorted(_lines(model.sharded_state_dict())) == record["keys"]


def test_parameters(case: tuple[LanguageModel, dict[str, list[str]]]) -> None:
    model, record = case
    lines = []
    for name, parameter in model.named_parameters():
        cut = "whole"
        if getattr(parameter, "tensor_model_parallel", False):
            cut = f"cut along {parameter.partition_dim}, stride {parameter.partition_stride}"
        lines.append(f"{name} {list(parameter.shape)} {parameter.dtype} {cut}")
    assert sorted(lines) == record["parameters"]


def test_norm_weights_carry_the_sequence_parallel_mark(case: tuple[LanguageModel, dict[str, list[str]]]) -> None:
    model, _ = case
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) >= 5
    assert all(hasattr(parameter, "sequence_parallel") for parameter in norms)
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in norms)
