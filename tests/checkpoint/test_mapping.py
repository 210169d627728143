"""The mapping table: complete, without overlap, and laid out as Megatron's layers expect."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_flowrl.checkpoint.families import FAMILIES
from megatron_flowrl.checkpoint.load import global_parameters, load_to_host, load_weights
from megatron_flowrl.checkpoint.mapping import (
    LocalTensor,
    Shard,
    Slice,
    assemble,
    hugging_face_shapes,
    is_exported,
    local_tensor,
)
from megatron_flowrl.checkpoint.sources import SafetensorsSource
from megatron_flowrl.config import load_config
from megatron_flowrl.model.architecture import FAMILIES as SUPPORTED_FAMILIES
from megatron_flowrl.model.architecture import Architecture, architecture_of
from megatron_flowrl.model.build import ParallelModel, build_parallel_model
from megatron_flowrl.model.layout import padded_vocab_size
from megatron_flowrl.platform import Platform
from tests.tiny_models import MODELS, VOCABULARY, save_model

ARCHITECTURES = {name: architecture_of(hf) for name, hf in MODELS.items()}
TP_SIZES = (1, 2, 4)  # 4 ranks are more than any of the models has groups


def megatron_names(architecture: Architecture) -> list[str]:
    """Every parameter of the whole model: see `test_every_parameter_of_a_model_is_mapped`."""
    layer = [
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        *(["self_attention.linear_qkv.bias"] if architecture.qkv_bias else []),
        *([f"self_attention.{x}_layernorm.weight" for x in "qk"] if architecture.qk_norm else []),
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    return [
        "embedding.word_embeddings.weight",
        *(f"decoder.layers.{i}.{name}" for i in range(architecture.num_layers) for name in layer),
        "decoder.final_layernorm.weight",
        *([] if architecture.tie_word_embeddings else ["output_layer.weight"]),
    ]


def shards(tp_size: int, divisible_by: int = 8) -> list[Shard]:
    padded = padded_vocab_size(VOCABULARY, divisible_by, tp_size)
    return [Shard(rank, tp_size, padded) for rank in range(tp_size)]


def full_tensors(architecture: Architecture) -> dict[str, Tensor]:
    """Every element of every Hugging Face tensor another number."""
    start, tensors = 0, {}
    for name, shape in hugging_face_shapes(architecture).items():
        size = math.prod(shape)
        tensors[name] = torch.arange(start, start + size, dtype=torch.float64).view(shape)
        start += size
    return tensors


def put_together(part: LocalTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    pieces = [tensors[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start) for piece in part.slices]
    return torch.cat(pieces, dim=part.dim)


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_are_those_of_transformers(name: str) -> None:
    state = AutoModelForCausalLM.from_config(MODELS[name]).state_dict()
    if MODELS[name].tie_word_embeddings:
        del state["lm_head.weight"]  # not in the file
    assert hugging_face_shapes(ARCHITECTURES[name]) == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("divisible_by", [1, 8, 128])
@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_all_ranks_give_the_tensors_back(name: str, tp_size: int, divisible_by: int) -> None:
    architecture = ARCHITECTURES[name]
    tensors, ranks, found = full_tensors(architecture), shards(tp_size, divisible_by), {}
    for parameter in megatron_names(architecture):
        assert is_exported(parameter, architecture)
        parts = []
        for shard in ranks:
            local = local_tensor(parameter, architecture, shard)
            padding = [torch.full((local.padding, architecture.hidden_size), -1.0)] if local.padding else []
            parts.append(torch.cat([*([put_together(local, tensors)] if local.slices else []), *padding]))
        found |= assemble(parameter, architecture, torch.stack(parts), ranks[0].padded_vocab)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_roles_decide_what_is_exported() -> None:
    tied, untied = ARCHITECTURES["qwen2_tied"], ARCHITECTURES["qwen2"]
    assert not is_exported("output_layer.weight", tied) and is_exported("output_layer.weight", untied)
    assert not is_exported("log_z.layers.0.weight", untied)
    with pytest.raises(KeyError, match=r"'value_head\.weight' has no counterpart"):
        is_exported("value_head.weight", untied)


def test_every_family_has_a_table() -> None:
    assert set(FAMILIES) == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("divisible_by", [1, 8, 128])
@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_the_slices_of_all_ranks_cover_each_tensor_once(name: str, tp_size: int, divisible_by: int) -> None:
    architecture = ARCHITECTURES[name]
    counts = {key: torch.zeros(shape) for key, shape in hugging_face_shapes(architecture).items()}
    for parameter in megatron_names(architecture):
        for shard in shards(tp_size, divisible_by):
            for piece in local_tensor(parameter, architecture, shard).slices:
                assert 0 <= piece.start < piece.stop <= counts[piece.name].shape[piece.dim]
                counts[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start).add_(1)
    for key, count in counts.items():
        copies = tp_size if "norm" in key else 1
        assert (count == copies).all(), key


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_ranks_have_equal_parts(name: str, tp_size: int) -> None:
    architecture, sizes = ARCHITECTURES[name], defaultdict(set)
    for parameter in megatron_names(architecture):
        for shard in shards(tp_size):
            part = local_tensor(parameter, architecture, shard)
            sizes[parameter].add(sum(piece.stop - piece.start for piece in part.slices) + part.padding)
            assert all(piece.dim == part.dim for piece in part.slices)
    assert all(len(of_ranks) == 1 for of_ranks in sizes.values())


@pytest.mark.parametrize("divisible_by", [1, 8, 128, 256])
@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied"])
def test_padding_stands_at_the_end_of_the_vocabulary_only(name: str, tp_size: int, divisible_by: int) -> None:
    """With a multiple of 256 the last ranks of 4 hold nothing but padding."""
    architecture = ARCHITECTURES[name]
    for parameter in megatron_names(architecture):
        rows: list[int] = []
        for shard in shards(tp_size, divisible_by):
            part = local_tensor(parameter, architecture, shard)
            rows += [row for piece in part.slices for row in range(piece.start, piece.stop)] + [-1] * part.padding
        if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
            padded = padded_vocab_size(VOCABULARY, divisible_by, tp_size)
            assert rows == [*range(VOCABULARY), *[-1] * (padded - VOCABULARY)]
        else:
            assert -1 not in rows, parameter


def test_a_rank_of_padding_alone() -> None:
    part = local_tensor("output_layer.weight", ARCHITECTURES["qwen2"], Shard(tp_rank=3, tp_size=4, padded_vocab=1024))
    assert part == LocalTensor((), dim=0, padding=256)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_attention_is_laid_out_group_by_group(name: str, tp_size: int) -> None:
    """Queries of the group's heads, its key, its value; then the next group; cut into equal parts for the ranks."""
    a, tensors = ARCHITECTURES[name], full_tensors(ARCHITECTURES[name])
    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        query, key, value = (tensors[f"model.layers.2.self_attn.{x}_proj.{kind}"] for x in "qkv")
        groups = [
            torch.cat(parts)
            for parts in zip(
                query.chunk(a.num_query_groups), key.chunk(a.num_query_groups), value.chunk(a.num_query_groups),
                strict=True,
            )
        ]  # fmt: skip
        expected = torch.cat(groups).chunk(tp_size)
        for shard in shards(tp_size):
            part = local_tensor(f"decoder.layers.2.self_attention.linear_qkv.{kind}", a, shard)
            assert torch.equal(put_together(part, tensors), expected[shard.tp_rank])


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_the_other_cuts(tp_size: int) -> None:
    """Gate and up projection by rows, a rank's parts together; projections back to the hidden size by columns."""
    a, tensors = ARCHITECTURES["llama"], full_tensors(ARCHITECTURES["llama"])
    layer = "model.layers.1"
    gate, up, down = (tensors[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
    out = tensors[f"{layer}.self_attn.o_proj.weight"]
    for shard in shards(tp_size):
        rank = shard.tp_rank

        def local(name: str, shard: Shard = shard) -> Tensor:
            return put_together(local_tensor(f"decoder.layers.1.{name}", a, shard), tensors)

        gated = torch.cat([gate.chunk(tp_size)[rank], up.chunk(tp_size)[rank]])
        assert torch.equal(local("mlp.linear_fc1.weight"), gated)
        assert torch.equal(local("mlp.linear_fc2.weight"), down.chunk(tp_size, dim=1)[rank])
        assert torch.equal(local("self_attention.linear_proj.weight"), out.chunk(tp_size, dim=1)[rank])
        for ours, theirs in (("self_attention.linear_qkv", "input"), ("mlp.linear_fc1", "post_attention")):
            assert torch.equal(local(f"{ours}.layer_norm_weight"), tensors[f"{layer}.{theirs}_layernorm.weight"])


def test_a_tied_output_layer_is_the_embedding() -> None:
    """It has a copy of its own where the last pipeline stage is not the first."""
    for shard in shards(2):
        tied, untied = (
            local_tensor("output_layer.weight", ARCHITECTURES[name], shard) for name in ("qwen2_tied", "qwen2")
        )
        assert tied == local_tensor("embedding.word_embeddings.weight", ARCHITECTURES["qwen2_tied"], shard)
        assert {piece.name for piece in untied.slices} == {"lm_head.weight"}


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.weight", "decoder.layers.x.mlp.linear_fc2.weight", "b"])
def test_an_unknown_parameter_is_named(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        local_tensor(name, ARCHITECTURES["qwen2"], Shard(0, 1, 304))


def built(name: str, platform: Platform, *settings: str) -> ParallelModel:
    config = load_config(None, ["model.path=.", "model.make_vocab_size_divisible_by=64", *settings])
    return build_parallel_model(ARCHITECTURES[name], config, platform)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_model_is_mapped(name: str, one_rank_platform: Platform) -> None:
    (module,) = built(name, one_rank_platform).modules
    architecture = ARCHITECTURES[name]
    parameters = dict(global_parameters(module))
    assert sorted(parameters) == sorted(megatron_names(architecture))
    shard = Shard(0, 1, module.vocab_size)
    for parameter_name, parameter in parameters.items():
        part = local_tensor(parameter_name, architecture, shard)
        length = sum(piece.stop - piece.start for piece in part.slices) + part.padding
        assert parameter.shape[part.dim] == length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen3"])
def test_loading_fills_every_element(name: str, dtype: str, tmp_path: Path, one_rank_platform: Platform) -> None:
    """Whatever was in memory before; padding is zero; the same in host memory as in the parameters."""
    source = SafetensorsSource(save_model(name, tmp_path), ARCHITECTURES[name])
    model = built(name, one_rank_platform, f"precision.dtype={dtype}")
    (module,) = model.modules
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    load_weights(model, source)
    hosted = load_to_host(model, source, pin_memory=False)

    parameters = dict(global_parameters(module))
    assert all(torch.equal(a, b) for a, b in zip(parameters.values(), hosted, strict=True))
    assert {p.dtype for p in (*parameters.values(), *hosted)} == {getattr(torch, dtype)}
    assert not any(parameter.isnan().any() for parameter in parameters.values())
    embedding = parameters["embedding.word_embeddings.weight"]
    expected = source.read(Slice("model.embed_tokens.weight", 0, 0, VOCABULARY)).to(embedding.dtype)
    assert torch.equal(embedding[:VOCABULARY], expected)
    assert embedding.shape[0] == 320 and not embedding[VOCABULARY:].any()
