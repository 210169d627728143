"""What every way for the trainer's weights into servers has in common."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.rollout.control import ServerControl
from megatron_flowrl.rollout.errors import ReplyError

_T = TypeVar("_T")
Troubles = dict[str, ReplyError]


@dataclass
class TransferTimes:
    """Seconds on this rank: into the medium (copy), and what the servers take from its end (load).

    `shm` and `gloo` gather nothing. What another back end gathers, and what servers load meanwhile, is in the copy.
    """

    copy: float = 0.0
    load: float = 0.0

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Add the block's time to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - began)


class WeightTransfer(ABC):
    """One way for the weights. Every rank of the trainer has one and calls the same methods, in the same order.

    `servers` are given to rank 0; the others give none. What goes wrong with a server is returned on rank 0, by
    address, never raised half-way: the other ranks are in collectives with this one. Such a server is in an unknown
    state and has to be started again.
    """

    def __init__(self, stream: WeightStream) -> None:
        self.stream = stream
        self.nbytes = sum(info.nbytes for info in stream.metadata())
        self.version: str | None = None
        self.times = TransferTimes()

    @abstractmethod
    def init(self, servers: Sequence[ServerControl]) -> Troubles:
        """Meet these servers, which have not been met."""

    @abstractmethod
    def send(self, servers: Sequence[ServerControl], version: str) -> Troubles:
        """Give these servers, which were met and are paused, the weights as they are now, by the name `version`."""

    def is_stale(self, server: ServerControl) -> bool:
        """Whether the server has other weights than those that were sent last."""
        return server.weight_version != self.version

    def close(self) -> None:
        """Give back what was taken; safe to call twice."""
        return None


def is_sender() -> bool:
    """Whether this rank is one of the replica whose shards are sent."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def merged(troubles: Troubles) -> Troubles:
    """Rank 0's troubles with those of all other ranks. A collective."""
    found: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, {url: str(error) for url, error in troubles.items()})
    everything = {url: ReplyError(message) for one in found for url, message in one.items()}
    return everything | troubles


def shared(value: _T) -> _T:
    """What rank 0 gives. A collective."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def as_reply_error(error: BaseException) -> ReplyError:
    """What went wrong with a server, whatever it was: it must not be raised half-way."""
    return error if isinstance(error, ReplyError) else ReplyError(repr(error))


def machine() -> str:
    """The same for processes that see one another in /proc."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
