"""Weights over TCP by gloo, from every rank's memory straight to every server's workers: any machines, no gathering.

Each server has a group of its own with the sending ranks, so that one that dies does not take the others' with it. For
each bucket of tensors a rank sends one message with its pieces (wire.py); the workers put them together and load them
while the next bucket is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.rollout.control import ServerControl, on_each
from megatron_flowrl.rollout.errors import ReplyError, Unreachable
from megatron_flowrl.rollout.transfer.base import (
    Troubles,
    WeightTransfer,
    as_reply_error,
    is_sender,
    machine,
    merged,
    shared,
)
from megatron_flowrl.rollout.transfer.wire import (
    IN_FLIGHT,
    MEETING_SECONDS,
    Message,
    TensorEntry,
    address_towards,
    cut_into_buckets,
    join,
    messages,
)

BUCKET_BYTES = 2**25


@dataclass(frozen=True)
class _Invitation:
    """How to join the group of one server."""

    url: str
    address: str
    port: int
    workers: int


@dataclass
class _Link:
    """This rank's end of the group with one server."""

    group: Any
    workers: range
    timeout: timedelta
    under_way: deque[list[Any]] = field(default_factory=deque)

    def send(self, message: Tensor, tag: int) -> None:
        """Begin to send, when few enough messages are under way."""
        self.settle(IN_FLIGHT - 1)
        self.under_way.append([self.group.send([message], worker, tag) for worker in self.workers])

    def settle(self, rest: int = 0) -> None:
        """Until all but `rest` messages have left.

        Raises RuntimeError where a worker is gone, or takes nothing in time.
        """
        while len(self.under_way) > rest:
            for work in self.under_way.popleft():
                work.wait(self.timeout)


class GlooTransfer(WeightTransfer):
    """All ranks construct it together; `timeout` bounds the wait for a server that takes nothing."""

    def __init__(self, stream: WeightStream, *, timeout: float, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(stream)
        # Half of what the servers' replies may take: one that takes nothing must not let the others run out of time.
        self._timeout = timedelta(seconds=timeout / 2)
        tensors = [TensorEntry(info.name, info.dtype, info.shape) for info in stream.metadata()]
        self._buckets = cut_into_buckets(tensors, bucket_bytes)
        pieces = [piece for piece, _ in stream.own_pieces()]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (pieces, machine()) if is_sender() else None)
        self._pieces: list[list[Slice]] = [one[0] for one in everywhere if one is not None]
        self._one_machine = len({one[1] for one in everywhere if one is not None}) == 1
        senders = [rank for rank, one in enumerate(everywhere) if one is not None]
        self._rank = senders.index(dist.get_rank()) if is_sender() else None
        self._messages = messages(self._buckets, pieces if is_sender() else [])
        self._links: dict[str, _Link] = {}
        self._stores: dict[str, Any] = {}  # on rank 0: the meeting places
        self._buffers: deque[Tensor] = deque()
        self._buffer_bytes = max((m.nbytes for m in self._messages if len(m.pieces) > 1), default=0)

    def init(self, servers: Sequence[ServerControl]) -> Troubles:
        """See WeightTransfer."""
        troubles, invitations, answers = self._invite(servers)
        for invitation in shared(invitations):
            if self._rank is None:
                continue
            try:
                self._links[invitation.url] = self._join(invitation, self._rank)
            except (RuntimeError, OSError) as error:
                troubles[invitation.url] = Unreachable(f"{invitation.url} could not be met over gloo: {error}")
        for url, answer in answers.items():
            if (refusal := answer.exception()) is not None:
                troubles[url] = as_reply_error(refusal)
        return merged(troubles)

    def send(self, servers: Sequence[ServerControl], version: str) -> Troubles:
        """See WeightTransfer."""
        urls = shared([server.url for server in servers])
        self.version = version
        troubles = servers[0].http.run(on_each(servers, ServerControl.start_weight_update)) if servers else {}
        loading = {
            server.url: server.http.start(server.update_weights({})) for server in servers if server.url not in troubles
        }
        for url in shared(sorted(troubles)):
            self._drop(url)
        with self.times.measuring("copy"):
            troubles |= self._send_pieces([url for url in urls if url in self._links])
        with self.times.measuring("load"):
            troubles |= _failures(loading)
            troubles = merged(troubles)
            well = [server for server in servers if server.url not in troubles]
            if well:
                finish = on_each(well, lambda server: server.finish_weight_update(version))
                troubles |= well[0].http.run(finish)
        for url in shared(sorted(troubles)):
            self._drop(url)
        return troubles

    def close(self) -> None:
        """See WeightTransfer."""
        self._links.clear()
        self._stores.clear()
        self._buffers.clear()

    def _invite(self, servers: Sequence[ServerControl]) -> tuple[Troubles, list[_Invitation], dict[str, Future[None]]]:
        """On rank 0: a meeting place for each server, and the word to its workers to come."""
        troubles: Troubles = {}
        invitations, answers = [], {}
        for server in servers:
            try:
                workers = server.http.run(server.world_size())
                host = urlsplit(server.url)
                address = address_towards(host.hostname or "", host.port or 80)
                if address.startswith("127.") and not self._one_machine:
                    raise OSError("the trainer's other machines do not reach a loopback address; set rollout.host")
                store = TCPStore(address, 0, None, True, wait_for_workers=False, timeout=self._timeout)
            except (ReplyError, RuntimeError, OSError) as error:
                troubles[server.url] = error if isinstance(error, ReplyError) else Unreachable(f"{server.url}: {error}")
                continue
            self._stores[server.url] = store
            invitations.append(_Invitation(server.url, address, store.port, workers))
            info = {
                "address": address,
                "port": store.port,
                "senders": len(self._pieces),
                "workers": workers,
                "timeout": self._timeout.total_seconds(),
                "meeting": MEETING_SECONDS * len(servers),  # they are met one after the other
                "tensors": [tensor.to_wire() for bucket in self._buckets for tensor in bucket],
                "bucket_sizes": [len(bucket) for bucket in self._buckets],
                "pieces": [[[p.name, p.dim, p.start, p.stop] for p in pieces] for pieces in self._pieces],
            }
            answers[server.url] = server.http.start(server.init_weight_transfer_engine(info))
        return troubles, invitations, answers

    def _join(self, invitation: _Invitation, rank: int) -> _Link:
        senders = len(self._pieces)
        group = join(invitation.address, invitation.port, rank, senders + invitation.workers)
        return _Link(group, range(senders, senders + invitation.workers), self._timeout)

    def _send_pieces(self, urls: Sequence[str]) -> Troubles:
        """This rank's messages, bucket by bucket, to every server; some are on their way meanwhile."""
        troubles: Troubles = {}
        pieces = dict(self.stream.own_pieces())  # views, so that all can be held at once
        for tag, message in enumerate(self._messages):
            if message.nbytes and any(url in self._links for url in urls):
                content = self._filled(message, pieces)
                for url in urls:
                    if url in self._links:
                        self._attempt(url, troubles, lambda link, c=content, t=tag: link.send(c, t))
        for url in urls:
            if url in self._links:
                self._attempt(url, troubles, _Link.settle)
        return troubles

    def _filled(self, message: Message, pieces: Mapping[Slice, Tensor]) -> Tensor:
        """The message's bytes: the weight itself where that is all of it, else one of the buffers that take turns."""
        first = pieces[message.pieces[0]]
        if len(message.pieces) == 1 and first.dtype == message.places[0].dtype and first.is_contiguous():
            return first.view(-1).view(torch.uint8)
        content = self._buffer(message.nbytes)
        for piece, place in zip(message.pieces, message.places, strict=True):
            place.view(content).copy_(pieces[piece])
        return content

    def _buffer(self, nbytes: int) -> Tensor:
        """One of a ring of buffers, one more than can be under way, so that what it held has left."""
        if nbytes > self._buffer_bytes:
            return torch.empty(nbytes, dtype=torch.uint8)
        if len(self._buffers) <= IN_FLIGHT:
            self._buffers.append(torch.empty(self._buffer_bytes, dtype=torch.uint8))
        else:
            self._buffers.rotate(-1)
        return self._buffers[-1].narrow(0, 0, nbytes)

    def _attempt(self, url: str, troubles: Troubles, action: Any) -> None:
        try:
            action(self._links[url])
        except RuntimeError as error:
            troubles[url] = Unreachable(f"{url} took no more weights over gloo: {error}")
            self._drop(url)

    def _drop(self, url: str) -> None:
        self._links.pop(url, None)
        self._stores.pop(url, None)


def _failures(loading: dict[str, Future[None]]) -> Troubles:
    found = {url: future.exception() for url, future in loading.items()}
    return {url: as_reply_error(error) for url, error in found.items() if error is not None}
