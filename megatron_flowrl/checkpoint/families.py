"""The mapping table: of which Hugging Face tensors each Megatron parameter is made, family by family.

It is only data, and the only place that knows names of both worlds: import, export and the weight stream read it
through `mapping`. A new family is an entry of `FAMILIES`: its parameters, each with a role, and the tensors the role
is made of, with their shapes in the dimensions of `dimensions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megatron_flowrl.model.architecture import Architecture


class Role(Enum):
    """What a Megatron parameter is for, which decides how it is laid out, cut, padded and tied."""

    EMBEDDING = "embedding"  # rows of the vocabulary, padded, cut by rows; a tied output layer reads it too
    OUTPUT = "output"  # the same for the output layer, which a tied model has no tensor for
    REPLICATED = "replicated"  # whole on every tensor-parallel rank
    COLUMNS = "columns"  # cut by input features
    GATED = "gated"  # rank by rank the rank's part of the gate, then the same part of the up projection
    QKV = "qkv"  # group by group the queries of the group's heads, its key, its value; cut in equal parts


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor of a Hugging Face checkpoint; its shape is given by names of `dimensions`."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter, and the Hugging Face tensors its role puts together."""

    role: Role
    megatron: str
    tensors: tuple[HuggingFaceTensor, ...]


@dataclass(frozen=True)
class Family:
    """A model's parameters in the order of the forward pass; names in `layer` are relative to the prefixes."""

    before: tuple[Parameter, ...]
    layer: tuple[Parameter, ...]
    after: tuple[Parameter, ...]
    megatron_layer: str = "decoder.layers.{}."
    hugging_face_layer: str = "model.layers.{}."


def dimensions(architecture: Architecture) -> Mapping[str, int]:
    """The sizes that shapes in the table are made of."""
    return {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "query": architecture.num_attention_heads * architecture.head_dim,
        "key": architecture.num_query_groups * architecture.head_dim,
        "head": architecture.head_dim,
        "ffn": architecture.ffn_hidden_size,
    }


def _parameter(role: Role, megatron: str, *tensors: tuple[str, ...]) -> Parameter:
    return Parameter(role, megatron, tuple(HuggingFaceTensor(name, shape) for name, *shape in tensors))  # type: ignore[arg-type]


def _decoder(*attention: Parameter) -> Family:
    """A Llama-like decoder, with what a family's attention has beside the four projections."""
    return Family(
        before=(
            _parameter(
                Role.EMBEDDING, "embedding.word_embeddings.weight", ("model.embed_tokens.weight", "vocab", "hidden")
            ),
        ),
        layer=(
            _parameter(
                Role.REPLICATED, "self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight", "hidden")
            ),
            _parameter(
                Role.QKV,
                "self_attention.linear_qkv.weight",
                ("self_attn.q_proj.weight", "query", "hidden"),
                ("self_attn.k_proj.weight", "key", "hidden"),
                ("self_attn.v_proj.weight", "key", "hidden"),
            ),
            *attention,
            _parameter(
                Role.COLUMNS, "self_attention.linear_proj.weight", ("self_attn.o_proj.weight", "hidden", "query")
            ),
            _parameter(
                Role.REPLICATED, "mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight", "hidden")
            ),
            _parameter(
                Role.GATED,
                "mlp.linear_fc1.weight",
                ("mlp.gate_proj.weight", "ffn", "hidden"),
                ("mlp.up_proj.weight", "ffn", "hidden"),
            ),
            _parameter(Role.COLUMNS, "mlp.linear_fc2.weight", ("mlp.down_proj.weight", "hidden", "ffn")),
        ),
        after=(
            _parameter(Role.REPLICATED, "decoder.final_layernorm.weight", ("model.norm.weight", "hidden")),
            _parameter(Role.OUTPUT, "output_layer.weight", ("lm_head.weight", "vocab", "hidden")),
        ),
    )


_QKV_BIAS = _parameter(
    Role.QKV,
    "self_attention.linear_qkv.bias",
    ("self_attn.q_proj.bias", "query"),
    ("self_attn.k_proj.bias", "key"),
    ("self_attn.v_proj.bias", "key"),
)
_QK_NORM = (
    _parameter(Role.REPLICATED, "self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", "head")),
    _parameter(Role.REPLICATED, "self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", "head")),
)

FAMILIES: Mapping[str, Family] = {
    "llama": _decoder(),
    "mistral": _decoder(),
    "qwen2": _decoder(_QKV_BIAS),
    "qwen3": _decoder(*_QK_NORM),
}
