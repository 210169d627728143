"""Weights into parameters, Transformer Engine's quantised ones included (played by a stand-in: no FP8 on a CPU)."""

from __future__ import annotations

import pytest
import torch

from megatron_flowrl.checkpoint import load
from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.checkpoint.sources import RandomSource
from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import architecture_of
from megatron_flowrl.model.build import ParallelModel, build_parallel_model
from megatron_flowrl.platform import Platform
from tests.tiny_models import MODELS

ARCHITECTURE = architecture_of(MODELS["qwen2"])
NAME = "decoder.layers.0.mlp.linear_fc2.weight"


@pytest.fixture
def model(one_rank_platform: Platform) -> ParallelModel:
    return build_parallel_model(ARCHITECTURE, Config(), one_rank_platform)


def test_host_tensors_are_what_the_parameters_get(model: ParallelModel) -> None:
    source = RandomSource(ARCHITECTURE, seed=1)
    load.load_weights(model, source)
    host = load.load_to_host(model, source, pin_memory=False)
    assert all(torch.equal(p, h) for p, h in zip(model.modules[0].parameters(), host, strict=True))


def test_padding_rows_are_zero_and_nothing_is_left_unfilled(model: ParallelModel) -> None:
    for parameter in model.modules[0].parameters():
        parameter.data.fill_(float("nan"))
    load.load_weights(model, RandomSource(ARCHITECTURE, seed=1))
    assert not any(parameter.isnan().any() for parameter in model.modules[0].parameters())
    embedding = model.modules[0].embedding.word_embeddings.weight
    assert embedding.shape[0] == 384 and not embedding[ARCHITECTURE.vocab_size :].any()


def test_a_quantised_weight_is_written_whole_and_its_main_weight_starts_unquantised(
    model: ParallelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RandomSource(ARCHITECTURE, seed=1)
    weight = dict(model.modules[0].named_parameters())[NAME]
    unquantized = torch.zeros(weight.shape, dtype=weight.dtype)
    weight.get_high_precision_init_val = lambda: unquantized  # type: ignore[attr-defined]
    monkeypatch.setattr(load, "is_float8tensor", lambda parameter: parameter is weight)
    monkeypatch.setattr(weight, "narrow", lambda *_: pytest.fail("a quantised weight has no parts"), raising=False)
    load.load_weights(model, source)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = source.read(Slice(name, 1, 0, ARCHITECTURE.ffn_hidden_size)).bfloat16()
    assert torch.equal(weight, expected)
    assert torch.equal(unquantized, expected)
