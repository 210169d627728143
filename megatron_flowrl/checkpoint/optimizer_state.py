"""The optimizer's state as sharded tensors under parameter names, saved and loaded where it lies.

Megatron's distributed optimizer gives every data-parallel rank a range of each flattened parameter. A range of a
matrix is at most three rectangles: the end of a row, whole rows, the beginning of a row. So each rank describes its
ranges as rectangles of the whole tensors, writes them without a word to the others, and reads back, under any layout
and with or without the distributed optimizer, whatever its ranges are then. (Megatron's own resharding format gathers
whole states over the data-parallel ranks for each save, and does not load into torch's AdamW.)

    optimizer.exp_avg.KEY, optimizer.exp_avg_sq.KEY, and for parameters not in fp32 optimizer.main.KEY, their fp32
    main weights; KEY is the parameter's in the model's own sharded state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor


@dataclass(frozen=True)
class _Range:
    """Elements `start` to `stop` of a flattened parameter, and this rank's flat states for them."""

    parameter: Tensor
    start: int
    stop: int
    states: Mapping[str, Tensor]
    replicated: bool
    """Every data-parallel rank has the same range."""


@dataclass(frozen=True)
class _Piece:
    """A tensor of the checkpoint that holds the elements from `start` of a flattened parameter."""

    sharded: ShardedTensor
    start: int


def optimizer_tensors(
    optimizer: MegatronOptimizer, model_state: Sequence[Mapping[str, Any]], vocab_size: int
) -> list[ShardedTensor]:
    """This rank's states, as views of them. `model_state`: each chunk's sharded state, with the parameters in it.

    Rows of padding after the vocabulary, which differ from layout to layout, are left out: their states are 0.
    """
    pieces: dict[int, list[_Piece]] = {}
    for value in (value for chunk in model_state for value in chunk.values()):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None:
            pieces[id(value.data)] = _pieces_of(value)
    return [
        rectangle
        for part in _parts(optimizer)
        for held in _ranges(part)
        for name, values in held.states.items()
        for piece in pieces[id(held.parameter)]
        for rectangle in _rectangles(f"optimizer.{name}.", values, held, piece, vocab_size)
    ]


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates made so far, as Adam's bias correction counts them. All ranks call it: one may hold no state."""
    steps = [0]
    for part in _parts(optimizer):
        steps += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
        steps += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
    everywhere = [0] * dist.get_world_size()
    dist.all_gather_object(everywhere, max(steps))
    return max(everywhere)


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Count on from `step`: torch's AdamW counts in its states, the fused ones in their parameter groups."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)
        if not isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["step"] = step


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _ranges(part: Any) -> Iterator[_Range]:
    inner = part.optimizer.state
    if isinstance(part, DistributedOptimizer):
        # Not by `model_param_group_index_map`: it is wrong where a group has bf16 and fp32 parameters.
        where = {
            parameter: ranges["param"]
            for by_dtype in part.gbuf_ranges
            for buckets in by_dtype.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }
        for models, shards in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for parameter, main in zip(chain(*models), chain(*shards), strict=True):
                states = _states(parameter, main, inner)
                yield _Range(parameter, where[parameter].start, where[parameter].end, states, replicated=False)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(parameters, mains, strict=True):
                yield _Range(parameter, 0, parameter.numel(), _states(parameter, main, inner), replicated=True)
        for parameter in chain(*part.fp32_from_fp32_groups):
            yield _Range(parameter, 0, parameter.numel(), _states(parameter, parameter, inner), replicated=True)
    elif isinstance(part, FP32Optimizer):
        for parameter in part.get_parameters():
            yield _Range(parameter, 0, parameter.numel(), _states(parameter, parameter, inner), replicated=True)
    else:
        raise TypeError(f"{type(part).__name__} is an optimizer whose state this project does not know")


def _states(parameter: Tensor, main: Tensor, inner: Mapping[Tensor, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Flat; an fp32 parameter is its own main weight."""
    states = {} if parameter.dtype == torch.float32 else {"main": main.detach()}
    return {
        name: value.view(-1)
        for name, value in (states | dict(inner[main])).items()
        if isinstance(value, Tensor) and value.shape == main.shape
    }


def _pieces_of(value: ShardedTensor | ShardedTensorFactory) -> list[_Piece]:
    """A factory cuts a fused parameter, such as gate and up, along its rows into tensors that reshard on their own."""
    if isinstance(value, ShardedTensor):
        return [_Piece(value, 0)]
    pieces: list[_Piece] = []
    start = 0  # counted, not read off the storage: pieces of a quantised weight have storage of their own
    for tensor in nested_values({"": value.build()}):
        pieces.append(_Piece(tensor, start))
        start += tensor.data.numel()
    if start != value.data.numel():
        raise RuntimeError(f"{value.key}: pieces of {start} elements do not make up {value.data.numel()}")
    return pieces


def _rectangles(prefix: str, values: Tensor, held: _Range, piece: _Piece, vocab_size: int) -> Iterator[ShardedTensor]:
    """The part of the range that is in the piece."""
    sharded, begin = piece.sharded, piece.start
    rows, row_length = sharded.local_shape[0], sharded.data.numel() // sharded.local_shape[0]
    global_shape, lead = sharded.global_shape, sharded.prepend_axis_num
    first_row = sharded.global_offset[lead]
    if sharded.allow_shape_mismatch:  # cut by the vocabulary
        global_shape = (*global_shape[:lead], min(vocab_size, global_shape[lead]), *global_shape[lead + 1 :])
        rows = max(0, min(rows, global_shape[lead] - first_row))
    start, stop = max(held.start, begin), min(held.stop, begin + rows * row_length)
    replica = sharded.replica_id if held.replicated else (*sharded.replica_id[:-1], 0)
    for row, column, height, width in _cut(start - begin, stop - begin, row_length):
        at = begin + row * row_length + column - held.start
        inner_shape = (height, width) if sharded.data.dim() == 2 else (height,)
        local_shape = (*(1,) * lead, *inner_shape)
        offset = (*sharded.global_offset[:lead], first_row + row)
        if sharded.data.dim() == 2:
            offset = (*offset, sharded.global_offset[lead + 1] + column)
        yield ShardedTensor(
            key=prefix + sharded.key,
            data=values[at : at + height * width].view(local_shape),
            dtype=values.dtype,
            local_shape=local_shape,
            global_shape=global_shape,
            global_offset=offset,
            axis_fragmentations=None,
            replica_id=replica,
        )


def _cut(start: int, stop: int, width: int) -> Iterable[tuple[int, int, int, int]]:
    """Elements `start` to `stop` of rows of `width`, as rectangles (row, column, height, width), in order."""
    while start < stop:
        row, column = divmod(start, width)
        if column == 0 and stop - start >= width:
            height = (stop - start) // width
            yield row, 0, height, width
            start += height * width
        else:
            length = min(width - column, stop - start)
            yield row, column, 1, length
            start += length
