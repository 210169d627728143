"""The mapping table read in both directions: a rank's part of a Megatron parameter as slices of Hugging Face tensors.

The parts of all tensor-parallel ranks give a Hugging Face tensor back (`assemble`): the same slices say where each
piece belongs, so no second set of rules has to agree with the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from megatron_flowrl.checkpoint.families import FAMILIES, HuggingFaceTensor, Parameter, Role, dimensions
from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.gpt import OWN_HEADS


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


@cache
def hugging_face_shapes(architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, in the order of the forward pass."""
    sizes = dimensions(architecture)
    return {
        tensor.name: tuple(sizes[dim] for dim in tensor.shape)
        for parameter in _parameters(architecture).values()
        if not (parameter.role is Role.OUTPUT and architecture.tie_word_embeddings)
        for tensor in parameter.tensors
    }


def is_exported(name: str, architecture: Architecture) -> bool:
    """Whether the Megatron parameter `name` has tensors of its own in a Hugging Face checkpoint.

    The heads of this project have none, nor has a tied output layer, whose weight is the embedding's. Raises KeyError
    for a name that is neither in the table nor a head's.
    """
    if name.startswith(OWN_HEADS):
        return False
    return not (_parameter(name, architecture).role is Role.OUTPUT and architecture.tie_word_embeddings)


def local_tensor(name: str, architecture: Architecture, shard: Shard) -> LocalTensor:
    """What `shard` holds of the Megatron parameter `name`, whose layer number is the global one.

    Raises KeyError for a name that no Hugging Face tensor corresponds to.
    """
    parameter = _parameter(name, architecture)
    tensors, rank, ranks = parameter.tensors, shard.tp_rank, shard.tp_size
    match parameter.role:
        case Role.EMBEDDING | Role.OUTPUT:
            if parameter.role is Role.OUTPUT and architecture.tie_word_embeddings:
                tensors = _embedding(architecture).tensors
            return _vocabulary(tensors[0].name, architecture.vocab_size, shard)
        case Role.REPLICATED:
            (tensor,) = tensors
            return LocalTensor((Slice(tensor.name, 0, 0, _size(tensor, 0, architecture)),))
        case Role.COLUMNS:
            (tensor,) = tensors
            width = _size(tensor, 1, architecture) // ranks
            return LocalTensor((Slice(tensor.name, 1, rank * width, (rank + 1) * width),), dim=1)
        case Role.GATED:
            rows = _size(tensors[0], 0, architecture) // ranks
            return LocalTensor(tuple(Slice(t.name, 0, rank * rows, (rank + 1) * rows) for t in tensors))
        case Role.QKV:
            return LocalTensor(_qkv(tensors, architecture, rank, ranks))


def assemble(name: str, architecture: Architecture, parts: Tensor, padded_vocab: int) -> dict[str, Tensor]:
    """The Hugging Face tensors of a Megatron parameter from the parts of all tensor-parallel ranks.

    parts [ranks, *shape of a part], any dtype. New tensors, but views where the parts, as they lie, are the tensor.
    """
    shapes, places = hugging_face_shapes(architecture), []
    for rank, part in enumerate(parts):
        local, position = local_tensor(name, architecture, Shard(rank, len(parts), padded_vocab)), 0
        for piece in local.slices:
            places.append((piece, part.narrow(local.dim, position, piece.stop - piece.start)))
            position += piece.stop - piece.start
    if parts.is_contiguous() and _is_laid_in_order([piece for piece, _ in places]):
        return {places[0][0].name: parts.flatten(0, 1)[: shapes[places[0][0].name][0]]}
    tensors: dict[str, Tensor] = {}
    for piece, values in places:
        if values.shape == shapes[piece.name] and values.is_contiguous():
            tensors[piece.name] = values
            continue
        if piece.name not in tensors:
            tensors[piece.name] = values.new_empty(shapes[piece.name])
        tensors[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start).copy_(values)
    return tensors


def _is_laid_in_order(pieces: Sequence[Slice]) -> bool:
    """Whether the pieces, end to end, are the rows of one tensor from its first."""
    return all(piece.name == pieces[0].name and piece.dim == 0 for piece in pieces) and [
        piece.start for piece in pieces
    ] == [0, *(piece.stop for piece in pieces[:-1])]


@cache
def _parameters(architecture: Architecture) -> Mapping[str, Parameter]:
    """Megatron's name in the whole model -> its entry of the table, names of layers filled in."""
    family = FAMILIES[architecture.family]
    layers = [
        Parameter(
            entry.role,
            family.megatron_layer.format(index) + entry.megatron,
            tuple(
                HuggingFaceTensor(family.hugging_face_layer.format(index) + tensor.name, tensor.shape)
                for tensor in entry.tensors
            ),
        )
        for index in range(architecture.num_layers)
        for entry in family.layer
    ]
    return {parameter.megatron: parameter for parameter in (*family.before, *layers, *family.after)}


def _parameter(name: str, architecture: Architecture) -> Parameter:
    try:
        return _parameters(architecture)[name]
    except KeyError:
        raise KeyError(f"Megatron parameter {name!r} has no counterpart in a Hugging Face checkpoint") from None


@cache
def _embedding(architecture: Architecture) -> Parameter:
    return next(p for p in _parameters(architecture).values() if p.role is Role.EMBEDDING)


def _size(tensor: HuggingFaceTensor, dim: int, architecture: Architecture) -> int:
    return dimensions(architecture)[tensor.shape[dim]]


def _vocabulary(name: str, vocab_size: int, shard: Shard) -> LocalTensor:
    rows = shard.padded_vocab // shard.tp_size
    first, last = shard.tp_rank * rows, (shard.tp_rank + 1) * rows
    real = min(last, vocab_size)
    slices = (Slice(name, 0, first, real),) if real > first else ()
    return LocalTensor(slices, padding=last - max(real, first))


def _qkv(tensors: Sequence[HuggingFaceTensor], a: Architecture, rank: int, ranks: int) -> tuple[Slice, ...]:
    """Groups may be cut too, when there are more ranks than groups."""
    query_rows = a.num_attention_heads // a.num_query_groups * a.head_dim
    whole = [
        Slice(tensor.name, 0, group * rows, (group + 1) * rows)
        for group in range(a.num_query_groups)
        for tensor, rows in zip(tensors, (query_rows, a.head_dim, a.head_dim), strict=True)
    ]
    share = sum(s.stop - s.start for s in whole) // ranks
    return _cut(whole, rank * share, (rank + 1) * share)


def _cut(whole: list[Slice], first: int, last: int) -> tuple[Slice, ...]:
    """Rows `first` to `last` of slices laid end to end."""
    kept, position = [], 0
    for piece in whole:
        begin, end = max(first - position, 0), min(last - position, piece.stop - piece.start)
        if begin < end:
            kept.append(Slice(piece.name, piece.dim, piece.start + begin, piece.start + end))
        position += piece.stop - piece.start
    return tuple(kept)
