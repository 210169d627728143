"""What goes between a pool and its grading processes: frames of eight bytes of length and so many bytes.

To a process, pickled items: whoever holds the pool is trusted. From it, JSON: what a grader makes of an answer is data.
"""

from __future__ import annotations

import json
import pickle
import socket
import struct
from dataclasses import replace
from typing import Any

from megatron_flowrl.rewards.grader import Grade, Item

_LENGTH = struct.Struct("!Q")


def frame(payload: bytes) -> bytes:
    """The payload with its length before it."""
    return _LENGTH.pack(len(payload)) + payload


def first_frame(received: bytearray) -> bytes | None:
    """Take the first whole frame's payload from what was received; None where there is none yet."""
    if len(received) < _LENGTH.size:
        return None
    end = _LENGTH.size + _LENGTH.unpack_from(received)[0]
    if len(received) < end:
        return None
    payload = bytes(received[_LENGTH.size : end])
    del received[:end]
    return payload


def read_frame(channel: socket.socket) -> bytes | None:
    """Wait for a frame; None where the other end has closed."""
    head = _read(channel, _LENGTH.size)
    return None if head is None else _read(channel, _LENGTH.unpack(head)[0])


def _read(channel: socket.socket, count: int) -> bytes | None:
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        new = channel.recv_into(view[done:])
        if not new:
            return None
        done += new
    return bytes(content)


def encode_item(item: Item) -> bytes:
    """An item as a frame. Raises what pickle raises for a row or ground truth that cannot be pickled."""
    return frame(pickle.dumps(replace(item, row=dict(item.row)), protocol=pickle.HIGHEST_PROTOCOL))


def decode_item(payload: bytes) -> Item:
    """The item of a frame."""
    item: Item = pickle.loads(payload)
    return item


def encode_reply(**fields: Any) -> bytes:
    """A message of a grading process as a frame."""
    return frame(json.dumps(fields).encode())


def decode_reply(payload: bytes) -> dict[str, Any]:
    """A message of a grading process. Raises ValueError where it is none."""
    reply = json.loads(payload)
    if not isinstance(reply, dict):
        raise ValueError(f"{payload[:80]!r} is no message of a grading process")
    return reply


def encode_grade(grade: Grade) -> bytes:
    """A grade as a message."""
    return encode_reply(score=grade.score, key=grade.key, problem=grade.problem)


def decode_grade(payload: bytes) -> Grade:
    """The grade of a message. Raises ValueError where it is none."""
    reply = decode_reply(payload)
    if not isinstance(reply.get("score"), float):
        raise ValueError(f"{payload[:80]!r} is no grade")
    return Grade(reply["score"], reply.get("key"), reply.get("problem"))
