"""TensorBoard's event files, written without TensorFlow and without a thread.

A file is a sequence of records, each with its checksums, and a record an `Event` in protobuf: what `tensorboard`
reads back. It is written here rather than by `SummaryWriter` because that one writes from a thread of its own, which
ends for good when the disk is full.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary  # type: ignore[import-untyped]
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
from tensorboard.compat.proto.types_pb2 import DT_STRING  # type: ignore[import-untyped]
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # type: ignore[import-untyped]
from tensorboard.plugins.text.metadata import create_summary_metadata  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from megatron_flowrl.observe.growing import GrowingFile
from megatron_flowrl.platform.atomic import partials_in, remove, write_bytes

_BUCKETS = 30
_PREFIX = "events.out.tfevents."
# A record: its length (8 bytes) and the length's checksum (4), the event, the event's checksum (4).
_BEFORE, _FRAME = 12, 16


class EventFile(GrowingFile):
    """A new event file in `folder`; what the files before it say of steps from `purge_step` on is dropped.

    From those files, because TensorBoard forgets scalars and histograms when it is told to, but no text; and it is
    told to, because one that is running has read them.
    """

    def __init__(self, folder: Path, purge_step: int, settings: Mapping[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        for partial in partials_in(folder):
            remove(partial)
        for path in folder.glob(f"{_PREFIX}*"):
            _forget(path, purge_step)
        super().__init__(folder / _new_name(folder))
        now = time.time()
        start = SessionLog(status=SessionLog.START)
        values = [_text("run/settings", _table(settings)), *_hyper_parameters(settings, now)]
        # Of the first step to come: what a start that came to nothing has said of it is forgotten too.
        self._head = (
            _record(Event(wall_time=now, file_version="brain.Event:2"))
            + _record(Event(wall_time=now, step=purge_step, session_log=start))
            + _record(Event(wall_time=now, step=purge_step, summary=Summary(value=values)))
        )

    def append(self, piece: bytes) -> None:
        """As for any file; the head of the file goes before the first piece that could be written."""
        super().append(self._head + piece)
        self._head = b""


def step_event(
    step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]], text: Mapping[str, str]
) -> bytes:
    """The record of a step. Values of a histogram that are not finite are left out; `text` is Markdown."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    for tag, numbers in histograms.items():
        counted = _histogram(numbers)
        if counted is not None:
            values.append(Summary.Value(tag=tag, histo=counted))
    values += [_text(tag, content) for tag, content in text.items()]
    return _record(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def literal(text: str) -> str:
    """Markdown that shows `text` as it is, whatever it holds."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _new_name(folder: Path) -> str:
    """Readers take files in the order of their names: it has to come after those there, whatever the clock says."""
    given = [path.name.removeprefix(_PREFIX).partition(".")[0] for path in folder.glob(f"{_PREFIX}*")]
    newest = max((int(number) for number in given if number.isdecimal()), default=0)
    return f"{_PREFIX}{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}.0"


def _forget(path: Path, purge_step: int) -> None:
    """Drop records of steps from `purge_step` on, and from the first that is no whole one."""
    content, kept, place = path.read_bytes(), [], 0
    while place + _FRAME <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        record = content[place : place + _FRAME + length]
        try:
            step = Event.FromString(record[_BEFORE : _BEFORE + length]).step
        except DecodeError:
            break
        if len(record) < _FRAME + length:
            break
        if step < purge_step:
            kept.append(record)
        place += len(record)
    if sum(map(len, kept)) < len(content):
        write_bytes(path, b"".join(kept))


def _record(event: Any) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def _text(tag: str, content: str) -> Any:
    tensor = TensorProto(dtype=DT_STRING, string_val=[content.encode("utf-8", "replace")])
    return Summary.Value(tag=tag, metadata=create_summary_metadata(None, None), tensor=tensor)


def _table(settings: Mapping[str, Any]) -> str:
    shown = {key: " ".join(str(value).split()) for key, value in settings.items()}
    rows = (f"| {key} | `{value.replace('|', '/').replace('`', chr(39))}` |" for key, value in shown.items())
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _hyper_parameters(settings: Mapping[str, Any], now: float) -> list[Any]:
    plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
    return list(hparams_pb(plain, start_time_secs=now).value)


def _histogram(numbers: Sequence[float]) -> Any:
    values = np.asarray(numbers, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    counts, limits = np.array([values.size]), np.array([high])
    if low < high:
        counts, edges = np.histogram(values, bins=_BUCKETS)
        limits = edges[1:]
    return HistogramProto(
        min=low,
        max=high,
        num=values.size,
        sum=float(values.sum()),
        sum_squares=float(np.square(values).sum()),
        bucket_limit=limits.tolist(),
        bucket=counts.tolist(),
    )


__all__ = ["EventFile", "literal", "step_event"]
