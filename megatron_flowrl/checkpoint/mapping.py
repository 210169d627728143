"""Where each of Megatron's parameters comes from in a Hugging Face checkpoint: one table, read in both directions.

A Megatron parameter on one tensor-parallel rank is a list of slices of Hugging Face tensors, laid end to end:

* `linear_qkv` holds, group by group, the queries of the group's heads, its key, its value; ranks cut that in equal
  parts (within a group too, when there are more ranks than groups).
* `linear_fc1` holds this rank's part of the gate, then the same part of the up projection.
* Embedding and output layer are cut by vocabulary rows, padded with rows of zeros up to a common multiple.

All supported families (Qwen2, Qwen3, Llama, Mistral) name their tensors alike; they differ in which ones they have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from megatron_flowrl.model.architecture import Architecture


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `stop` along dimension `dim` of the Hugging Face tensor `name`."""

    name: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class LocalTensor:
    """One rank's part of a Megatron parameter: slices laid along `dim`, then `padding` rows of zeros."""

    slices: tuple[Slice, ...]
    dim: int = 0
    padding: int = 0


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter is meant."""

    tp_rank: int
    tp_size: int
    padded_vocab: int


_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# Megatron's name inside a layer -> (kind, Hugging Face's names inside a layer)
_LAYER: dict[str, tuple[str, tuple[str, ...]]] = {
    "self_attention.linear_qkv.layer_norm_weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", tuple(f"self_attn.{p}_proj.weight" for p in "qkv")),
    "self_attention.linear_qkv.bias": ("qkv", tuple(f"self_attn.{p}_proj.bias" for p in "qkv")),
    "self_attention.q_layernorm.weight": ("whole", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("whole", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("columns", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gated", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("columns", ("mlp.down_proj.weight",)),
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@cache
def hugging_face_shapes(architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, in the order of the forward pass."""
    a = architecture
    query, key = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (a.hidden_size,),
        "self_attn.q_proj.weight": (query, a.hidden_size),
        "self_attn.k_proj.weight": (key, a.hidden_size),
        "self_attn.v_proj.weight": (key, a.hidden_size),
    }
    if a.qkv_bias:
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in zip("qkv", (query, key, key), strict=True)}
    if a.qk_norm:
        layer |= {"self_attn.q_norm.weight": (a.head_dim,), "self_attn.k_norm.weight": (a.head_dim,)}
    layer |= {
        "self_attn.o_proj.weight": (a.hidden_size, query),
        "post_attention_layernorm.weight": (a.hidden_size,),
        "mlp.gate_proj.weight": (a.ffn_hidden_size, a.hidden_size),
        "mlp.up_proj.weight": (a.ffn_hidden_size, a.hidden_size),
        "mlp.down_proj.weight": (a.hidden_size, a.ffn_hidden_size),
    }
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (a.vocab_size, a.hidden_size)}
    for index in range(a.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes[_FINAL_NORM] = (a.hidden_size,)
    if not a.tie_word_embeddings:
        shapes[_HEAD] = (a.vocab_size, a.hidden_size)
    return shapes


def local_tensor(name: str, architecture: Architecture, shard: Shard) -> LocalTensor:
    """What `shard` holds of the Megatron parameter `name`, whose layer number is the global one.

    Raises KeyError for a name that no Hugging Face tensor corresponds to.
    """
    if name == "embedding.word_embeddings.weight":
        return _vocabulary(_EMBEDDING, architecture, shard)
    if name == "output_layer.weight":
        return _vocabulary(_EMBEDDING if architecture.tie_word_embeddings else _HEAD, architecture, shard)
    if name == "decoder.final_layernorm.weight":
        return _whole((_FINAL_NORM,), architecture, shard)
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise KeyError(f"Megatron parameter {name!r} has no counterpart in a Hugging Face checkpoint")
    kind, names = _LAYER[match[2]]
    return _KINDS[kind](tuple(f"model.layers.{match[1]}.{n}" for n in names), architecture, shard)


def _whole(names: tuple[str, ...], architecture: Architecture, shard: Shard) -> LocalTensor:
    size = hugging_face_shapes(architecture)[names[0]][0]
    return LocalTensor((Slice(names[0], 0, 0, size),))


def _columns(names: tuple[str, ...], architecture: Architecture, shard: Shard) -> LocalTensor:
    width = hugging_face_shapes(architecture)[names[0]][1] // shard.tp_size
    return LocalTensor((Slice(names[0], 1, shard.tp_rank * width, (shard.tp_rank + 1) * width),), dim=1)


def _gated(names: tuple[str, ...], architecture: Architecture, shard: Shard) -> LocalTensor:
    rows = architecture.ffn_hidden_size // shard.tp_size
    return LocalTensor(tuple(Slice(n, 0, shard.tp_rank * rows, (shard.tp_rank + 1) * rows) for n in names))


def _qkv(names: tuple[str, ...], architecture: Architecture, shard: Shard) -> LocalTensor:
    a = architecture
    query_rows = a.num_attention_heads // a.num_query_groups * a.head_dim
    whole = [
        Slice(name, 0, group * rows, (group + 1) * rows)
        for group in range(a.num_query_groups)
        for name, rows in zip(names, (query_rows, a.head_dim, a.head_dim), strict=True)
    ]
    share = sum(s.stop - s.start for s in whole) // shard.tp_size
    return LocalTensor(_cut(whole, shard.tp_rank * share, (shard.tp_rank + 1) * share))


def _cut(whole: list[Slice], first: int, last: int) -> tuple[Slice, ...]:
    """Rows `first` to `last` of slices laid end to end."""
    kept, position = [], 0
    for piece in whole:
        begin, end = max(first - position, 0), min(last - position, piece.stop - piece.start)
        if begin < end:
            kept.append(Slice(piece.name, piece.dim, piece.start + begin, piece.start + end))
        position += piece.stop - piece.start
    return tuple(kept)


def _vocabulary(name: str, architecture: Architecture, shard: Shard) -> LocalTensor:
    rows = shard.padded_vocab // shard.tp_size
    first, last = shard.tp_rank * rows, (shard.tp_rank + 1) * rows
    real = min(last, architecture.vocab_size)
    slices = (Slice(name, 0, first, real),) if real > first else ()
    return LocalTensor(slices, padding=last - max(real, first))


_KINDS: dict[str, Callable[[tuple[str, ...], Architecture, Shard], LocalTensor]] = {
    "whole": _whole,
    "columns": _columns,
    "gated": _gated,
    "qkv": _qkv,
}
