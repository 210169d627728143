"""`nccl` and `ipc`: vLLM's own transfer engines at both ends, fed by the weight stream. GPUs only.

This module imports vLLM into the trainer; the others leave it to its own processes.
"""

from __future__ import annotations

import base64
import pickle
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.rollout.control import ServerControl, on_each
from megatron_flowrl.rollout.errors import Unreachable
from megatron_flowrl.rollout.transfer.base import Troubles, WeightTransfer, is_sender, merged, shared
from megatron_flowrl.rollout.transfer.wire import address_towards


class MegatronWeightSource(WeightSource):
    """vLLM's view of the weight stream: whole Hugging Face tensors, gathered from the shards bucket by bucket.

    Iterating is a collective of a replica's ranks, once a round.
    """

    def __init__(self, stream: WeightStream) -> None:
        self._stream = stream
        self._running: Iterator[tuple[str, Tensor]] | None = None

    def begin(self) -> None:
        """A new round."""
        self._running = None

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of every tensor, alike on every rank; nothing is moved."""
        return [ParamMeta(info.name, info.dtype, info.shape) for info in self._stream.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._running = iter(self._stream)
        return self._running

    def drain(self) -> None:
        """Take part in what this round has left, so that an error of one rank does not leave the others waiting."""
        for _ in iter(self) if self._running is None else self._running:
            pass


class FleetClient:
    """vLLM's VLLMWeightSyncClient over several servers: what the one sender says goes to all, at once.

    Ranks in a common group are shifted server by server. What a server does wrong is kept in `troubles`, and raised;
    with `raises` false, the server is told nothing more instead.
    """

    def __init__(self, servers: Sequence[ServerControl], version: str = "", *, raises: bool = True) -> None:
        self._servers, self.version, self._raises = list(servers), version, raises
        self.troubles: Troubles = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Raises ReplyError, as the others do."""
        offset, infos = init_info.get("rank_offset"), {}
        for server in self._servers:
            infos[server.url] = dict(init_info) if offset is None else {**init_info, "rank_offset": offset}
            if offset is not None:
                offset += server.http.run(server.world_size())
        self._on_each(lambda server: server.init_weight_transfer_engine(infos[server.url]))

    def start_weight_update(self) -> None:
        """See init_weight_transfer_engine."""
        self._on_each(lambda server: server.start_weight_update())

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """See init_weight_transfer_engine. CUDA handles are pickled, which JSON cannot carry."""
        if isinstance(update_info, list):
            raise TypeError("one update for all workers is expected")
        info = dict(update_info)
        handles = info.pop("ipc_handles", None)
        if handles is not None:
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        info = {name: value for name, value in info.items() if value is not None}
        self._on_each(lambda server: server.update_weights(info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See init_weight_transfer_engine. vLLM's engines give no version: ours does."""
        self._on_each(lambda server: server.finish_weight_update(weight_version or self.version))

    def _on_each(self, action: Any) -> None:
        servers = [server for server in self._servers if server.url not in self.troubles]
        if servers:
            self.troubles |= servers[0].http.run(on_each(servers, action))
        if self.troubles and self._raises:
            raise next(iter(self.troubles.values()))


class VllmEngineTransfer(WeightTransfer):
    """vLLM's engine `backend`. One group for all servers: when one fails, all are in an unknown state."""

    def __init__(self, stream: WeightStream, backend: str, *, timeout: float) -> None:
        super().__init__(stream)
        self._backend, self._timeout = backend, timeout
        self._source = MegatronWeightSource(stream)
        # With `ipc` every GPU's worker takes the copy of the trainer's rank on that GPU; else one replica sends.
        self._takes_part = backend == "ipc" or is_sender()
        self._engine: TrainerWeightTransferEngine[Any] | None = None
        self._met: list[str] = []
        self._client = FleetClient(())

    def init(self, servers: Sequence[ServerControl]) -> Troubles:
        """The meeting is part of `send`: a group has to have all servers that take part."""
        return {}

    def send(self, servers: Sequence[ServerControl], version: str) -> Troubles:
        """See WeightTransfer."""
        troubles: Troubles = {}
        self._source.begin()
        with self.times.measuring("copy"):
            try:
                self._meet(servers)
                self._client.version = version
                if self._takes_part and self._engine is not None:
                    with self._bounded(self._engine):
                        self._engine.send_weights()
            except Exception as error:  # whatever it is, the other ranks and the next attempt need this one
                if self._takes_part:
                    self._source.drain()
                everyone = {server.url: Unreachable(f"{server.url} got no weights by {self._backend}: {error}")
                            for server in servers}  # fmt: skip
                troubles = everyone | self._client.troubles
        self.version = version
        troubles = merged(troubles | self._client.troubles)
        if troubles:
            self.close()
        return troubles

    @contextmanager
    def _bounded(self, engine: Any) -> Iterator[None]:
        """NCCL waits for ever for a peer that is gone: abort its communicator, which ends the wait with an error."""
        group = getattr(engine, "model_update_group", None)
        timer = threading.Timer(self._timeout, group.destroy if group is not None else lambda: None)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        """See WeightTransfer."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine, self._met = None, []

    def _meet(self, servers: Sequence[ServerControl]) -> None:
        urls = shared([server.url for server in servers])
        if urls == self._met:
            return
        self.close()
        if not urls:
            return
        # With `ipc` the ranks meet for every chunk: what a server does wrong must not take rank 0 out of that.
        self._client = FleetClient(servers, raises=self._backend != "ipc")
        info = self._init_info(servers)
        if self._takes_part:
            self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)
        self._met = urls

    def _init_info(self, servers: Sequence[ServerControl]) -> TrainerInitInfo:
        rank = dist.get_rank()
        if self._backend == "ipc":
            largest = max(info.nbytes for info in self.stream.metadata())
            buffer = max(DEFAULT_PACKED_BUFFER_SIZE_BYTES, largest)
            return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer)  # bounded memory
        address, port, workers = "", 0, 0
        if rank == 0:
            host = urlsplit(servers[0].url)
            address = address_towards(host.hostname or "", host.port or 80)
            with socket.socket() as probe:
                probe.bind((address, 0))
                port = probe.getsockname()[1]
            workers = sum(server.http.run(server.world_size()) for server in servers)
        return NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=1 + workers)
