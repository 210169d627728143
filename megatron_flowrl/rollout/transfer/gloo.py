"""Weights over TCP by gloo, from every rank's memory straight to every server's workers: any machines, no gathering.

Each server has a group of its own with the sending ranks, so that one that dies does not take the others' with it. For
each bucket of tensors a rank sends one message with its pieces (wire.py); the workers put them together and load them
while the next bucket is under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
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
from megatron_flowrl.rollout.transfer.base import Troubles, WeightTransfer, is_sender, merged, shared
from megatron_flowrl.rollout.transfer.wire import (
    Message,
    TensorEntry,
    address_towards,
    cut_into_buckets,
    join,
    messages,
)

BUCKET_BYTES = 2**26


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
    sent: list[Any] = field(default_factory=list)

    def send(self, message: Tensor, tag: int) -> None:
        self.settle()
        self.sent = [self.group.send([message], worker, tag) for worker in self.workers]

    def settle(self) -> None:
        """Until what was sent last has left. Raises RuntimeError where a worker is gone, or takes nothing in time."""
        for work in self.sent:
            work.wait(self.timeout)
        self.sent = []


class GlooTransfer(WeightTransfer):
    """All ranks construct it together; `timeout` bounds the wait for a server that takes nothing."""

    def __init__(self, stream: WeightStream, *, timeout: float, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(stream)
        self._timeout = timedelta(seconds=timeout)
        self._tensors = [TensorEntry(info.name, info.dtype, info.shape) for info in stream.metadata()]
        self._buckets = cut_into_buckets(self._tensors, bucket_bytes)
        pieces = [piece for piece, _ in stream.own_pieces()]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, pieces if is_sender() else None)
        self._pieces: list[list[Slice]] = [one for one in everywhere if one is not None]
        senders = [rank for rank, one in enumerate(everywhere) if one is not None]
        self._rank = senders.index(dist.get_rank()) if is_sender() else None
        self._messages = messages(self._buckets, pieces if is_sender() else [])
        self._links: dict[str, _Link] = {}
        self._stores: list[Any] = []

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
            try:
                answer.result()
            except ReplyError as error:
                troubles[url] = error
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

    def _invite(self, servers: Sequence[ServerControl]) -> tuple[Troubles, list[_Invitation], dict[str, Future[None]]]:
        """On rank 0: a meeting place for each server, and the word to its workers to come."""
        troubles: Troubles = {}
        invitations, answers = [], {}
        for server in servers:
            try:
                workers = server.http.run(server.world_size())
                host = urlsplit(server.url)
                address = address_towards(host.hostname or "", host.port or 80)
                store = TCPStore(address, 0, None, True, wait_for_workers=False, timeout=self._timeout)
            except (ReplyError, RuntimeError, OSError) as error:
                troubles[server.url] = error if isinstance(error, ReplyError) else Unreachable(f"{server.url}: {error}")
                continue
            self._stores.append(store)
            invitations.append(_Invitation(server.url, address, store.port, workers))
            info = {
                "address": address,
                "port": store.port,
                "senders": len(self._pieces),
                "workers": workers,
                "timeout": self._timeout.total_seconds(),
                "tensors": [tensor.to_wire() for tensor in self._tensors],
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
        """This rank's messages, bucket by bucket, to every server; the one before is on its way meanwhile."""
        troubles: Troubles = {}
        filled = self._filled()
        for tag, message in enumerate(self._messages):
            if message.nbytes == 0:
                continue
            content = next(filled)
            for url in urls:
                if url in self._links:
                    self._attempt(url, troubles, lambda link, c=content, t=tag: link.send(c, t))
        for _ in filled:  # to its end, where others take part
            raise RuntimeError("the stream yields more pieces than it announced")
        for url in urls:
            if url in self._links:
                self._attempt(url, troubles, _Link.settle)
        return troubles

    def _attempt(self, url: str, troubles: Troubles, action: Any) -> None:
        try:
            action(self._links[url])
        except RuntimeError as error:
            troubles[url] = Unreachable(f"{url} took no more weights over gloo: {error}")
            self._drop(url)

    def _filled(self) -> Iterator[Tensor]:
        """The contents of this rank's messages that are not empty."""
        pieces = self.stream.own_pieces()
        for message in self._messages:
            if message.nbytes:
                yield _fill(message, pieces)
        for piece, _ in pieces:
            if is_sender():
                raise RuntimeError(f"{piece} was not announced")

    def _drop(self, url: str) -> None:
        self._links.pop(url, None)


def _fill(message: Message, pieces: Iterator[tuple[Any, Tensor]]) -> Tensor:
    content = torch.empty(message.nbytes, dtype=torch.uint8)
    for expected, place in zip(message.pieces, message.places, strict=True):
        piece, values = next(pieces)
        if (piece.name, piece.start) != (expected.name, expected.start):
            raise RuntimeError(f"the stream yields {piece} where {expected} was announced")
        place.view(content).copy_(values)
    return content


def _failures(loading: dict[str, Future[None]]) -> Troubles:
    troubles: Troubles = {}
    for url, future in loading.items():
        with suppress(ReplyError):
            future.result()
        error = future.exception()
        if isinstance(error, ReplyError):
            troubles[url] = error
    return troubles
