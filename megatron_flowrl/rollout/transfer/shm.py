"""Weights through memory that the trainer's ranks and the servers' workers share: one machine, no gathering.

Every rank copies its own pieces to where they belong in the whole Hugging Face tensors, and the workers load from
there. The memory has no name: workers open it through /proc/PROCESS/fd, so that it is gone with the processes, however
they end, and the size of /dev/shm does not matter. It is kept between syncs.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.config import UserError
from megatron_flowrl.platform.distributed import together
from megatron_flowrl.rollout.control import ServerControl, on_each
from megatron_flowrl.rollout.transfer.base import Troubles, WeightTransfer, is_sender, machine, shared
from megatron_flowrl.rollout.transfer.wire import lay_out, total_bytes


class ShmTransfer(WeightTransfer):
    """All ranks construct it together. Raises UserError where they or memory do not allow it."""

    def __init__(self, stream: WeightStream) -> None:
        super().__init__(stream)
        self._entries = {entry.name: entry for entry in lay_out(stream.metadata())}
        self._size = total_bytes(list(self._entries.values()))
        self._handle: int | None = None
        with together():
            if dist.get_rank() == 0:
                self._handle = _reserve(self._size)
        self._path, place = shared((f"/proc/{os.getpid()}/fd/{self._handle}", machine()))
        with together():
            if is_sender():
                self._map(place)

    def _map(self, place: str) -> None:
        if machine() != place:
            raise UserError(
                f"rollout.transfer = shm: rank {dist.get_rank()} on {socket.gethostname()} does not share memory with "
                "rank 0; it is for ranks of one machine (and container): set rollout.transfer=gloo"
            )
        handle = os.open(self._path, os.O_RDWR)
        try:
            self._memory = mmap.mmap(handle, self._size)
        finally:
            os.close(handle)
        self._buffer = torch.frombuffer(self._memory, dtype=torch.uint8)

    def init(self, servers: Sequence[ServerControl]) -> Troubles:
        """See WeightTransfer."""
        if not servers:
            return {}
        info = {
            "path": self._path,
            "nbytes": self._size,
            "tensors": [entry.to_wire() for entry in self._entries.values()],
        }
        return servers[0].http.run(on_each(servers, lambda server: server.init_weight_transfer_engine(info)))

    def send(self, servers: Sequence[ServerControl], version: str) -> Troubles:
        """See WeightTransfer."""
        with self.times.measuring("copy"):
            self._write()
            dist.barrier()
        self.version = version
        if not servers:
            return {}
        with self.times.measuring("load"):
            return servers[0].http.run(on_each(servers, lambda server: server.give_weights({}, version)))

    def _write(self) -> None:
        with _one_thread():
            for piece, values in self.stream.own_pieces():
                if is_sender():
                    piece.of(self._entries[piece.name].view(self._buffer)).copy_(values)

    def close(self) -> None:
        """See WeightTransfer. Servers that have met it keep what they have mapped until they end."""
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
            self._handle = None


def _reserve(nbytes: int) -> int:
    """A file in memory, all of it taken now: later, a page that is not there would be a signal, not an error."""
    handle = os.memfd_create("megatron_flowrl_weights")
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        os.close(handle)
        raise UserError(
            f"rollout.transfer = shm: {nbytes / 2**20:.0f} MiB of shared memory for the weights cannot be had "
            f"({error.strerror}); free some, or set rollout.transfer=gloo or disk"
        ) from error
    return handle


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copies of many small tensors: a server's workers poll a while for more work, and threads would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
