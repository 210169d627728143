"""The model as a stream of whole Hugging Face tensors, gathered from the shards in buckets.

Every rank of a replica takes part and gets every tensor. A bucket travels twice: from the pipeline stage that owns
it to the others, each tensor-parallel rank sending its own part, then between the tensor-parallel ranks. While one
bucket is unpacked and used, the next one is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_flowrl.checkpoint.load import global_parameters, shard_of
from megatron_flowrl.checkpoint.mapping import LocalTensor, assemble, hugging_face_shapes, is_exported, local_tensor
from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.model.build import ParallelModel, weights_in_place

BUCKET_BYTES = 2**29
_IN_FLIGHT = 2  # buckets: one that is used, and the next


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the stream before it is moved."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Part:
    """A Megatron parameter as one tensor-parallel rank holds it; `stage` is the pipeline stage that does."""

    name: str
    stage: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class _Flight:
    """A bucket under way."""

    def __init__(self, parts: Sequence[_Part], flat: Tensor, nbytes: int) -> None:
        self.parts, self.nbytes, self._flat = parts, nbytes, flat
        self._tp_group = parallel_state.get_tensor_model_parallel_group()
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        self._work: dist.Work | None = None
        if pp_group.size() > 1:
            source = dist.get_global_rank(pp_group, parts[0].stage)
            self._work = dist.broadcast(flat, source, group=pp_group, async_op=True)
        else:
            self._start_gather()

    def land(self) -> Tensor:
        """[tensor-parallel ranks, elements of the bucket]"""
        if self._work is not None:
            self._work.wait()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            self._start_gather()
            if self._work is not None:
                self._work.wait()
        return self._gathered

    def _start_gather(self) -> None:
        ranks = self._tp_group.size()
        self._work = None
        if ranks == 1:
            self._gathered = self._flat.unsqueeze(0)
            return
        self._gathered = self._flat.new_empty(ranks, self._flat.numel())
        self._work = dist.all_gather_into_tensor(
            self._gathered.view(-1), self._flat, group=self._tp_group, async_op=True
        )


def plain_values(parameter: Tensor) -> Tensor:
    """A parameter's values in an ordinary format: itself, detached, where it is not FP8."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter.detach()


class WeightStream:
    """An iterable of (Hugging Face name, tensor) over a parallel model.

    `dtype` is what the tensors are cast to, once, before they travel where that makes them smaller; None keeps the
    model's. `bucket_bytes` bounds the memory beside the model's; a parameter too large for it travels alone. All
    ranks of a replica have to construct it together, and iterate together, to the end. The weights are those of the
    moment when a bucket is packed: do not train meanwhile.
    """

    def __init__(
        self, model: ParallelModel, *, dtype: torch.dtype | None = None, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._model = model
        self._architecture = model.architecture
        self._own = {
            name: parameter
            for module in model.modules
            for name, parameter in global_parameters(module)
            if is_exported(name, model.architecture)
        }
        self._stored = model.transformer_config.params_dtype
        self.dtype = dtype or self._stored
        self._wire = min(self.dtype, self._stored, key=lambda d: d.itemsize)
        largest = max(info.nbytes for info in self.metadata())
        self._in_flight_bytes = max(bucket_bytes - largest, bucket_bytes // 2)  # beside the tensor in use
        self._order = {name: place for place, name in enumerate(hugging_face_shapes(self._architecture))}
        self._device = next(model.modules[0].parameters()).device
        self._parts = self._survey()

    def metadata(self) -> list[TensorInfo]:
        """Name, shape and dtype of everything the stream yields, in its order; nothing is moved."""
        return [TensorInfo(name, shape, self.dtype) for name, shape in hugging_face_shapes(self._architecture).items()]

    def held(self) -> list[Slice]:
        """The parts of Hugging Face tensors that this rank holds."""
        shard = shard_of(self._model.modules[0])
        return [piece for name in self._own for piece in local_tensor(name, self._architecture, shard).slices]

    @torch.no_grad()
    def own_pieces(self) -> Iterator[tuple[Slice, Tensor]]:
        """Pieces of Hugging Face tensors out of this rank's memory, views where it holds no FP8; in metadata's order.

        The ranks of a replica together have every element once: what is whole on each tensor-parallel rank is the
        first one's. Nothing is gathered, but all ranks of all replicas have to iterate, to the end.
        """
        shard = shard_of(self._model.modules[0])
        with weights_in_place(self._model.chunks):
            for name in sorted(self._own, key=lambda name: self._order[self._tensors_of(name)[0]]):
                local = local_tensor(name, self._architecture, shard)
                if shard.tp_rank > 0 and self._is_whole(local):
                    continue
                values, position, found = plain_values(self._own[name]), 0, []
                for piece in local.slices:
                    length = piece.stop - piece.start
                    found.append((piece, values.narrow(local.dim, position, length)))
                    position += length
                # Query, key and value lie in turns, group by group.
                yield from sorted(found, key=lambda one: (self._order[one[0].name], one[0].start))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.tensors()

    @torch.no_grad()
    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors among `names` (None: all), each whole and contiguous, on the model's device.

        All ranks of a replica have to ask for the same names. A tensor is only good until the next one is asked for.
        """
        with weights_in_place(self._model.chunks):
            waiting, flights = deque(self._buckets(names)), deque[_Flight]()
            while waiting or flights:
                while waiting and len(flights) < _IN_FLIGHT and self._has_room(flights, waiting[0]):
                    flights.append(self._launch(waiting.popleft()))
                yield from self._unpack(flights.popleft(), names)

    def _survey(self) -> list[_Part]:
        """Every parameter of the model in the order of the Hugging Face names, and the stage that has it."""
        own = {name: tuple(parameter.shape) for name, parameter in self._own.items()}
        group = parallel_state.get_pipeline_model_parallel_group()
        everywhere: list[Mapping[str, tuple[int, ...]]] = [{}] * group.size()
        dist.all_gather_object(everywhere, own, group=group)
        parts = [_Part(name, stage, shape) for stage, theirs in enumerate(everywhere) for name, shape in theirs.items()]
        return sorted(parts, key=lambda part: self._order[self._tensors_of(part.name)[0]])

    def _is_whole(self, local: LocalTensor) -> bool:
        """Whether this is not a part of a tensor but all of it."""
        piece, shapes = local.slices[0], hugging_face_shapes(self._architecture)
        return len(local.slices) == 1 and piece.stop - piece.start == shapes[piece.name][piece.dim]

    def _tensors_of(self, name: str) -> list[str]:
        """Hugging Face names made of a Megatron parameter."""
        shard = shard_of(self._model.modules[0])
        whole = local_tensor(name, self._architecture, type(shard)(0, 1, shard.padded_vocab))
        return list(dict.fromkeys(piece.name for piece in whole.slices))

    def _buckets(self, names: Collection[str] | None) -> Iterator[list[_Part]]:
        bucket: list[_Part] = []
        for part in self._parts:
            if names is not None and not any(tensor in names for tensor in self._tensors_of(part.name)):
                continue
            if bucket and (
                part.stage != bucket[0].stage or self._nbytes([*bucket, part]) > self._in_flight_bytes // _IN_FLIGHT
            ):
                yield bucket
                bucket = []
            bucket.append(part)
        if bucket:
            yield bucket

    def _nbytes(self, bucket: Sequence[_Part]) -> int:
        """What a bucket in flight takes on a rank: its own part and, gathered, those of all ranks.

        Gloo gathers into memory of its own first.
        """
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        gathered = 0 if ranks == 1 else ranks if self._device.type == "cuda" else 2 * ranks
        return sum(part.numel for part in bucket) * self._wire.itemsize * (1 + gathered)

    def _has_room(self, flights: Collection[_Flight], bucket: Sequence[_Part]) -> bool:
        in_flight = sum(flight.nbytes for flight in flights)
        return not flights or in_flight + self._nbytes(bucket) <= self._in_flight_bytes

    def _launch(self, bucket: Sequence[_Part]) -> _Flight:
        flat = torch.empty(sum(part.numel for part in bucket), dtype=self._wire, device=self._device)
        if bucket[0].stage == parallel_state.get_pipeline_model_parallel_rank():
            for part, place in zip(bucket, flat.split([part.numel for part in bucket]), strict=True):
                place.view(part.shape).copy_(plain_values(self._own[part.name]))
        return _Flight(bucket, flat, self._nbytes(bucket))

    def _unpack(self, flight: _Flight, names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        gathered = flight.land()
        position, padded_vocab = 0, self._model.modules[0].vocab_size
        for part in flight.parts:
            shards = gathered.narrow(1, position, part.numel).unflatten(1, part.shape)
            position += part.numel
            for name, tensor in assemble(part.name, self._architecture, shards, padded_vocab).items():
                if names is None or name in names:
                    yield name, tensor.to(self.dtype)
