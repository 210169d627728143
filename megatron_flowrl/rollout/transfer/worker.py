"""The receiving ends of `shm`, `gloo` and `disk`, inside a vLLM worker.

All load through vLLM's layer-by-layer reload, as its own engines do: on a CPU the linears are packed, so that a
weight cannot be written in place. That reload keeps a *reference* to what it is given until the layer is complete.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.rollout.transfer.wire import IN_FLIGHT, Message, TensorEntry, join, messages, put_together


class _CheckpointEngine(WeightTransferEngine[Any, Any]):
    """Takes whole Hugging Face tensors, in any order, between a start and a finish."""

    _torn = False  # started and not finished

    def start_weight_update(self) -> None:
        if self._torn:  # what a broken update has left in the layers would be taken for a part of this one
            finalize_layerwise_reload(self.model, self.model_config)
        self._loaded, self._torn = set[str](), True
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._renew_tied()
        self._torn = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Hand whole tensors to the model."""
        model: Any = self.model
        model.load_weights(self._noted(tensors))

    def _noted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self._loaded.add(name.rpartition(".")[0])
            yield name, tensor

    def _renew_tied(self) -> None:
        """Give the new packed weight to layers that share a weight with one that was loaded.

        On a CPU a linear computes with a packed copy, and vLLM 0.32 renews that of the embedding only: a tied output
        layer would go on with the weights before.
        """
        modules = dict(self.model.named_modules())
        loaded = [modules[name] for name in self._loaded if hasattr(modules.get(name), "cpu_linear")]
        packed = {module.weight.data_ptr(): module for module in loaded if module.weight.numel()}
        for module in modules.values():
            weight = getattr(module, "weight", None)
            source = packed.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
            if source is not None and source is not module:
                module.cpu_linear = source.cpu_linear


@dataclass
class DiskInitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class DiskUpdateInfo(WeightTransferUpdateInfo):
    """The Hugging Face folder to read."""

    folder: str


class DiskWeightTransferEngine(_CheckpointEngine):
    """Reads an exported folder."""

    init_info_cls, update_info_cls = DiskInitInfo, DiskUpdateInfo

    def init_transfer_engine(self, init_info: DiskInitInfo) -> None:
        return None

    def receive_weights(self, update_info: DiskUpdateInfo) -> None:
        files = sorted(Path(update_info.folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{update_info.folder} has no *.safetensors: do the servers share this folder?")
        for path in files:
            with safe_open(path, framework="pt") as file:
                self.load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - not a dict

    def shutdown(self) -> None:
        return None


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Where the trainer's memory can be opened, and what lies in it."""

    path: str
    nbytes: int
    tensors: list[list[Any]]


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """All of it is written."""


class ShmWeightTransferEngine(_CheckpointEngine):
    """Loads from memory that the trainer's ranks write and this process maps."""

    init_info_cls, update_info_cls = ShmInitInfo, ShmUpdateInfo
    _memory: mmap.mmap | None = None
    _tensors: tuple[tuple[str, Tensor], ...] = ()

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self.shutdown()
        handle = os.open(init_info.path, os.O_RDONLY)
        try:
            # Shared: a private mapping would be a copy of what lies there now.
            self._memory = mmap.mmap(
                handle, init_info.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ
            )
        finally:
            os.close(handle)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        entries = [TensorEntry.from_wire(row) for row in init_info.tensors]
        self._tensors = tuple((entry.name, entry.view(whole)) for entry in entries)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        if self._memory is None:
            raise RuntimeError("update_weights before init_weight_transfer_engine")
        self.load(self._tensors)

    def shutdown(self) -> None:
        self._tensors = ()
        self._memory = None


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where to meet the senders, and what they will send; see wire.py."""

    address: str
    port: int
    senders: int
    workers: int
    timeout: float
    meeting: float
    tensors: list[list[Any]]
    bucket_sizes: list[int]
    pieces: list[list[list[Any]]]


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Everything was said at the meeting."""


@dataclass(frozen=True)
class _Arrival:
    """A sender's part of a bucket on its way."""

    message: Message
    content: Tensor
    work: Any


class GlooWeightTransferEngine(_CheckpointEngine):
    """Receives the pieces of every sending rank, and puts them together."""

    init_info_cls, update_info_cls = GlooInitInfo, GlooUpdateInfo
    _group: Any = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self.shutdown()
        rank = init_info.senders + self.parallel_config.data_parallel_index * self.parallel_config.world_size
        rank += self.parallel_config.rank
        size = init_info.senders + init_info.workers
        with _on_all_cores():
            self._group = join(init_info.address, init_info.port, rank, size, init_info.meeting)
        self._timeout = timedelta(seconds=init_info.timeout)
        tensors = iter([TensorEntry.from_wire(row) for row in init_info.tensors])
        self._buckets = [list(islice(tensors, size)) for size in init_info.bucket_sizes]
        self._messages = [messages(self._buckets, [Slice(*row) for row in rows]) for rows in init_info.pieces]

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("update_weights before init_weight_transfer_engine, or after a transfer that failed")
        arriving: deque[list[_Arrival]] = deque()
        try:
            for number, bucket in enumerate(self._buckets):
                while len(arriving) < IN_FLIGHT and number + len(arriving) < len(self._buckets):
                    arriving.append(self._expect(number + len(arriving)))  # comes while others are loaded
                now = arriving.popleft()
                for arrival in now:
                    arrival.work.wait(self._timeout)
                self.load(put_together(bucket, [(arrival.message, arrival.content) for arrival in now]))
        except BaseException:
            self.shutdown()  # breaks the connections: the senders do not wait for somebody who takes nothing more
            raise

    def _expect(self, number: int) -> list[_Arrival]:
        """Begin to receive a bucket. New memory for each: the reload keeps parts of it until a layer is complete."""
        arriving = []
        for sender, of_sender in enumerate(self._messages):
            message = of_sender[number]
            if message.nbytes:
                content = torch.empty(message.nbytes, dtype=torch.uint8)
                arriving.append(_Arrival(message, content, self._group.recv([content], sender, number)))
        return arriving

    def shutdown(self) -> None:
        self._group = None


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Threads that begin inside may run anywhere: vLLM binds its own to a core, which receiving would share."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
