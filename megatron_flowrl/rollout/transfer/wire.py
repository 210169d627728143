"""What both ends of a transfer agree on. Imports neither Megatron nor vLLM.

`shm`: the whole tensors lie in one buffer, as `lay_out` places them.

`gloo`: the tensors are cut into buckets. For each bucket a sender that has pieces of it sends one message,
its pieces as `lay_out` places them, and the receiver puts the pieces of all senders together.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from megatron_flowrl.checkpoint.slices import Slice

ALIGNMENT = 64  # bytes; a cache line
MEETING_SECONDS = 60.0
IN_FLIGHT = 4  # messages under way at once


class Described(Protocol):
    """A tensor before it is moved."""

    @property
    def name(self) -> str:
        """Hugging Face name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Format."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor and its place, in bytes, in a flat buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in `buffer`, uint8 [bytes]."""
        return buffer.narrow(0, self.offset, self.nbytes).view(self.dtype).view(self.shape)

    def to_wire(self) -> list[Any]:
        """As JSON carries it."""
        return [self.name, str(self.dtype).removeprefix("torch."), list(self.shape), self.offset]

    @classmethod
    def from_wire(cls, row: Sequence[Any]) -> TensorEntry:
        """The opposite of `to_wire`."""
        name, dtype, shape, offset = row
        return cls(name, getattr(torch, dtype), tuple(shape), offset)


def lay_out(tensors: Sequence[Described]) -> list[TensorEntry]:
    """Places for the tensors, one after the other, each on a cache line of its own."""
    entries, position = [], 0
    for tensor in tensors:
        entry = TensorEntry(tensor.name, tensor.dtype, tuple(tensor.shape), position)
        entries.append(entry)
        position += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    return entries


def total_bytes(entries: Sequence[TensorEntry]) -> int:
    """Size of the buffer that `lay_out` made places in."""
    return max((entry.offset + entry.nbytes for entry in entries), default=0)


def cut_into_buckets(tensors: Sequence[TensorEntry], bucket_bytes: int) -> list[list[TensorEntry]]:
    """Runs of tensors of at most `bucket_bytes` together; a larger tensor has a bucket of its own.

    The large ones come last: they arrive while others are loaded, instead of keeping the receiver waiting.
    """
    buckets: list[list[TensorEntry]] = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.nbytes > bucket_bytes):  # stable
        if buckets and sum(other.nbytes for other in buckets[-1]) + tensor.nbytes <= bucket_bytes:
            buckets[-1].append(tensor)
        else:
            buckets.append([tensor])
    return buckets


@dataclass(frozen=True)
class Message:
    """What one sender has of one bucket: pieces, and their places in the message."""

    pieces: tuple[Slice, ...]
    places: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes; 0 where there is nothing to send."""
        return total_bytes(self.places)


def messages(buckets: Sequence[Sequence[TensorEntry]], pieces: Sequence[Slice]) -> list[Message]:
    """A sender's message for each bucket. Both ends compute it from its pieces, in the order of the tensors."""
    by_name: dict[str, list[Slice]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    found = []
    for bucket in buckets:
        inside = [(entry, piece) for entry in bucket for piece in by_name.get(entry.name, ())]
        parts = [TensorEntry(piece.name, entry.dtype, piece.shape(entry.shape)) for entry, piece in inside]
        found.append(Message(tuple(piece for _, piece in inside), tuple(lay_out(parts))))
    return found


def put_together(bucket: Sequence[TensorEntry], received: Sequence[tuple[Message, Tensor]]) -> list[tuple[str, Tensor]]:
    """The whole tensors of a bucket from the senders' messages, uint8 [bytes] each; views of these where possible."""
    whole: dict[str, Tensor] = {}
    shapes = {entry.name: entry for entry in bucket}
    for message, content in received:
        for piece, place in zip(message.pieces, message.places, strict=True):
            values, entry = place.view(content), shapes[piece.name]
            if place.shape == entry.shape:
                whole[piece.name] = values
                continue
            if piece.name not in whole:
                whole[piece.name] = torch.empty(entry.shape, dtype=entry.dtype)
            piece.of(whole[piece.name]).copy_(values)
    return [(entry.name, whole[entry.name]) for entry in bucket]


def address_towards(host: str, port: int) -> str:
    """The address of this machine that packets to `host` leave from. Raises OSError where there is no way there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        probe.connect((host, port))
        found: str = probe.getsockname()[0]
    return found


def join(address: str, port: int, rank: int, size: int, seconds: float = MEETING_SECONDS) -> Any:
    """A gloo group of its own, apart from any that the process is in.

    Raises RuntimeError where the others do not come within `seconds`.

    An explicit store: what torchrun put into the environment is for the trainer's own group.
    """
    meeting = timedelta(seconds=seconds)
    store = TCPStore(address, port, None, False, wait_for_workers=False, timeout=meeting)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=address_towards(address, port))]
    options._timeout = meeting  # to meet; each wait for a message says its own
    return ProcessGroupGloo(PrefixStore("weights", store), rank, size, options)
