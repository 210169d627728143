"""The model as a stream of whole Hugging Face tensors, gathered from the shards in buckets.

Every rank of a replica takes part and gets every tensor. A bucket travels twice: from the pipeline stage that owns
it to the others, each tensor-parallel rank sending its own part, then between the tensor-parallel ranks. While one
bucket is unpacked and used, the next one is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_flowrl.checkpoint.load import global_parameters, shard_of
from megatron_flowrl.checkpoint.mapping import Slice, assemble, hugging_face_shapes, is_exported, local_tensor
from megatron_flowrl.model.build import ParallelModel, weights_in_place

BUCKET_BYTES = 2**28


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

    def __init__(self, parts: Sequence[_Part], flat: Tensor) -> None:
        self.parts, self._flat = parts, flat
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


class WeightStream:
    """An iterable of (Hugging Face name, tensor) over a parallel model.

    `dtype` is what the tensors are cast to, once, before they travel where that makes them smaller; None keeps the
    model's. `bucket_bytes` bounds what is in flight, both buckets together, but a larger tensor travels whole. All
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
        self._bucket_bytes = bucket_bytes
        self._parts = self._survey()

    def metadata(self) -> list[TensorInfo]:
        """Name, shape and dtype of everything the stream yields, in its order; nothing is moved."""
        return [TensorInfo(name, shape, self.dtype) for name, shape in hugging_face_shapes(self._architecture).items()]

    def held(self) -> list[Slice]:
        """The parts of Hugging Face tensors that this rank holds."""
        shard = shard_of(self._model.modules[0])
        return [piece for name in self._own for piece in local_tensor(name, self._architecture, shard).slices]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.tensors()

    @torch.no_grad()
    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors among `names` (None: all), each whole and contiguous, on the model's device.

        All ranks of a replica have to ask for the same names. A tensor is only good until the next one is asked for.
        """
        with weights_in_place(self._model.chunks):
            buckets, flights = iter(self._buckets(names)), deque[_Flight]()
            flights.extend(map(self._launch, islice(buckets, 1)))
            while flights:
                flights.extend(map(self._launch, islice(buckets, 1)))
                flight = flights.popleft()
                yield from self._unpack(flight, names)

    def _survey(self) -> list[_Part]:
        """Every parameter of the model in the order of the Hugging Face names, and the stage that has it."""
        own = {name: tuple(parameter.shape) for name, parameter in self._own.items()}
        group = parallel_state.get_pipeline_model_parallel_group()
        everywhere: list[Mapping[str, tuple[int, ...]]] = [{}] * group.size()
        dist.all_gather_object(everywhere, own, group=group)
        parts = [_Part(name, stage, shape) for stage, theirs in enumerate(everywhere) for name, shape in theirs.items()]
        order = {name: place for place, name in enumerate(hugging_face_shapes(self._architecture))}
        return sorted(parts, key=lambda part: order[self._tensors_of(part.name)[0]])

    def _tensors_of(self, name: str) -> list[str]:
        """Hugging Face names made of a Megatron parameter."""
        shard = shard_of(self._model.modules[0])
        whole = local_tensor(name, self._architecture, type(shard)(0, 1, shard.padded_vocab))
        return list(dict.fromkeys(piece.name for piece in whole.slices))

    def _buckets(self, names: Collection[str] | None) -> Iterator[list[_Part]]:
        bucket: list[_Part] = []
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        limit = self._bucket_bytes // (2 * ranks * self._wire.itemsize)  # elements a rank gives; two are in flight
        for part in self._parts:
            if names is not None and not any(tensor in names for tensor in self._tensors_of(part.name)):
                continue
            if bucket and (part.stage != bucket[0].stage or sum(p.numel for p in bucket) + part.numel > limit):
                yield bucket
                bucket = []
            bucket.append(part)
        if bucket:
            yield bucket

    def _launch(self, bucket: Sequence[_Part]) -> _Flight:
        device = next(self._model.modules[0].parameters()).device
        flat = torch.empty(sum(part.numel for part in bucket), dtype=self._wire, device=device)
        if bucket[0].stage == parallel_state.get_pipeline_model_parallel_rank():
            for part, place in zip(bucket, flat.split([part.numel for part in bucket]), strict=True):
                parameter = self._own[part.name]
                values = dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter.detach()
                place.view(part.shape).copy_(values)
        return _Flight(bucket, flat)

    def _unpack(self, flight: _Flight, names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        gathered = flight.land()
        position, padded_vocab = 0, self._model.modules[0].vocab_size
        for part in flight.parts:
            shards = [row.narrow(0, position, part.numel).view(part.shape) for row in gathered]
            position += part.numel
            for name, tensor in assemble(part.name, self._architecture, shards, padded_vocab).items():
                if names is None or name in names:
                    yield name, tensor.to(self.dtype)
