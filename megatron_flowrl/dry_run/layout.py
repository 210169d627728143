"""A layout at its true size, without weights and without ranks: who holds what, and who computes which answers.

Every rank of the run is looked at in turn, as Megatron's own groups place it (torch's fake process group stands for the
others). For each coordinate of tensor and pipeline parallelism its part of the model is built on the meta device, at
the true widths. Then

  a. every rank has coordinates (TP, PP, CP, DP) of its own,
  b. of every parameter the parts have the shapes that the mapping table says,
  c. the parts of all coordinates together are each tensor of the Hugging Face checkpoint exactly once,
  d. and so are those of the run's own checkpoints, by the global shapes and offsets that Megatron writes there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_flowrl.checkpoint.load import global_parameters, shard_of
from megatron_flowrl.checkpoint.mapping import hugging_face_shapes, is_exported, local_tensor
from megatron_flowrl.config import Config, ParallelConfig, UserError
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.build import build_parallel_model
from megatron_flowrl.model.gpt import OWN_HEADS
from megatron_flowrl.platform import Platform, current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups

Coordinates = tuple[int, int, int, int]  # TP, PP, CP, DP


class LayoutError(UserError):
    """The parts do not make a whole: the fault of the program, not of the recipe."""


@dataclass
class Parts:
    """What the ranks hold, gathered coordinate by coordinate."""

    pieces: dict[str, set[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(set))
    """Hugging Face tensor -> (dim, start, stop) of its pieces."""

    shards: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = field(default_factory=lambda: defaultdict(dict))
    """Tensor of the run's checkpoints -> offset and shape of its pieces."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The latter's whole shapes."""

    parameters: list[int] = field(default_factory=list)
    """Elements of each coordinate's parameters."""


def check_ranks(config: Config, architecture: Architecture, world_size: int, *, log_z: bool) -> Parts:
    """Go through all ranks; `config` is one that a CPU can build. Raises LayoutError where a. to d. do not hold."""
    parallel = config.parallel
    real = current_platform()
    meta = Platform(torch.device("meta"), "fake", real.libraries)
    ranks: dict[Coordinates, int] = {}
    parts = Parts()
    for rank in range(world_size):
        with as_rank(rank, world_size, parallel):
            at = coordinates()
            if at in ranks:
                raise LayoutError(f"ranks {ranks[at]} and {rank} both are at (TP, PP, CP, DP) = {at}")
            ranks[at] = rank
            if at[2:] == (0, 0):  # the others hold copies
                with torch.device("meta"):
                    _collect(build_parallel_model(architecture, config, meta, log_z=log_z), architecture, parts)
    _check_pieces(hugging_face_shapes(architecture), parts.pieces)
    _check_shards(parts)
    return parts


@contextmanager
def as_rank(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[None]:
    """Be a rank of a world that is not there, in Megatron's groups. Collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        destroy_process_groups()


def coordinates() -> Coordinates:
    """Of this rank."""
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )


def _collect(model: Any, architecture: Architecture, parts: Parts) -> None:
    for module in model.modules:
        for name, parameter in global_parameters(module):
            if not name.startswith(OWN_HEADS) and is_exported(name, architecture):
                _collect_pieces(name, parameter, module, architecture, parts)
        for key, value in _sharded(module.sharded_state_dict()):
            if parts.shapes.setdefault(key, value.global_shape) != value.global_shape:
                raise LayoutError(f"{key} is {parts.shapes[key]} on one rank and {value.global_shape} on another")
            if any(value.replica_id if isinstance(value.replica_id, tuple) else (value.replica_id,)):
                continue  # a copy of what another rank writes
            offset, shape = value.global_offset, value.local_shape
            if offset in parts.shards[key]:
                raise LayoutError(f"two ranks write {key} at {offset}")
            parts.shards[key][offset] = tuple(shape)
    parts.parameters.append(sum(p.numel() for module in model.modules for p in module.parameters()))


def _collect_pieces(name: str, parameter: Tensor, module: Any, architecture: Architecture, parts: Parts) -> None:
    shapes, local = hugging_face_shapes(architecture), local_tensor(name, architecture, shard_of(module))
    along = sum(piece.stop - piece.start for piece in local.slices) + local.padding
    for piece in local.slices:
        expected = list(shapes[piece.name])
        expected[local.dim] = along
        if tuple(expected) != tuple(parameter.shape):
            raise LayoutError(f"{name} has the shape {tuple(parameter.shape)}, and its slices make {tuple(expected)}")
        found = (piece.dim, piece.start, piece.stop)
        if found in parts.pieces[piece.name] and getattr(parameter, "tensor_model_parallel", False):
            raise LayoutError(f"{piece.name}: two ranks hold {found[1]} to {found[2]} of dimension {found[0]}")
        parts.pieces[piece.name].add(found)


def _sharded(tree: Any) -> Iterator[tuple[str, ShardedTensor]]:
    """The tensors of a sharded state dict; what is kept in other ways (TE's extra state) is no part of the weights."""
    if isinstance(tree, ShardedTensor):
        yield tree.key, tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _sharded(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _sharded(value)
    elif hasattr(tree, "build"):  # a factory: what is stored in another form than it is held
        yield from _sharded(tree.build())


def _check_pieces(shapes: Mapping[str, Sequence[int]], pieces: Mapping[str, set[tuple[int, int, int]]]) -> None:
    for name, shape in shapes.items():
        if not pieces.get(name):
            raise LayoutError(f"no rank holds {name}")
        (dim, *others) = {dim for dim, _, _ in pieces[name]}
        if others:
            raise LayoutError(f"{name} is cut along the dimensions {dim} and {others[0]}")
        position = 0
        for _, start, stop in sorted(pieces[name]):
            if start != position:
                what = "twice" if start < position else "by no rank"
                raise LayoutError(f"{name}: {min(start, position)} to {max(start, position)} is held {what}")
            position = stop
        if position != shape[dim]:
            raise LayoutError(f"{name}: {position} to {shape[dim]} is held by no rank")


def _check_shards(parts: Parts) -> None:
    for key, whole in parts.shapes.items():
        found = sum(math.prod(shape) for shape in parts.shards[key].values())
        if found != math.prod(whole):
            raise LayoutError(f"checkpoint: {key} of the shape {whole} is written with {found} elements")


__all__ = ["Coordinates", "LayoutError", "Parts", "as_rank", "check_ranks", "coordinates"]
