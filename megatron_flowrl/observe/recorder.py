"""What is kept of every step in the run's folder: metrics.jsonl, samples.jsonl and TensorBoard's files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_flowrl.config import TrackingConfig, UserError
from megatron_flowrl.observe.growing import GrowingFile
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.atomic import write_file

if TYPE_CHECKING:
    from megatron_flowrl.observe.tensorboard import EventFile

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TENSORBOARD = "tensorboard"
_NONE: Mapping[str, Sequence[float]] = MappingProxyType({})


@dataclass(frozen=True)
class Sample:
    """An answer of a step. `key`: its canonical form, where the grader knows one."""

    prompt: str
    response: str
    reward: float
    key: str | None


class Recorder:
    """On rank 0 alone. Writes into `folder`, which must be there:

    metrics.jsonl: a line a step, {"step", "time": Unix seconds, room/name: number}; null is what is not finite.
    samples.jsonl: a line an answer, {"step", "prompt", "response", "reward", "key"}.
    tensorboard/: both again, with histograms every settings.histogram_interval steps, and all settings.

    Nothing is in there twice. What the files say of steps after `resume_step`, the one that training goes on from, is
    dropped when they are opened, and lines that were cut off too; a step that is there already is not recorded again.

    Where a line cannot be written (a full disk), training goes on: it is said once, and again when the reason changes;
    when there is room again, so is recording. No line is ever half there.

    Raises UserError where the files cannot be opened, or TensorBoard's package is missing.
    """

    def __init__(
        self, folder: Path, settings: TrackingConfig, *, resume_step: int, hyper_parameters: Mapping[str, Any]
    ) -> None:
        self._settings, self._resumed = settings, resume_step
        self._said: str | None = None
        self.lost = 0
        """Lines of metrics.jsonl that could not be written."""
        try:
            self._last = max(_forget(folder / METRICS, resume_step), default=-1)
            _forget(folder / SAMPLES, resume_step)
            self._metrics, self._samples = GrowingFile(folder / METRICS), GrowingFile(folder / SAMPLES)
            self._events = self._open_events(folder / TENSORBOARD, dict(_flat(hyper_parameters)))
        except OSError as error:
            raise UserError(
                f"{error.filename or folder} cannot be opened to record the run: {error.strerror}; make room, or give "
                "another run.folder"
            ) from error
        if self._events is not None:
            self._report(_errors_of([(self._events, b"")]))

    def record(
        self,
        step: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] = _NONE,
        samples: Sequence[Sample] = (),
    ) -> None:
        """Write down a step. Of `samples` the first settings.samples are taken. Raises nothing of the disk's."""
        if step <= self._last:
            if step != self._resumed:
                logger.warning("step %d is recorded already, up to %d; it is not recorded again", step, self._last)
            return
        self._last = step
        samples = samples[: self._settings.samples]
        numbers = {name: float(value) for name, value in scalars.items()}
        line = {"step": step, "time": round(time.time(), 3), **{k: _finite(v) for k, v in numbers.items()}}
        pieces = [(self._metrics, _line(line))]
        if samples:
            pieces.append((self._samples, b"".join(_line(_sample(step, sample)) for sample in samples)))
        if self._events is not None:
            pieces.append((self._events, self._event(step, numbers, histograms, samples)))
        errors = _errors_of(pieces)
        self.lost += self._metrics in errors
        self._report(errors)

    def close(self) -> None:
        """Say what was lost, if anything."""
        if self.lost:
            logger.warning("%s lacks %d lines, which could not be written", self._metrics.path, self.lost)
            self.lost = 0

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_events(self, folder: Path, settings: Mapping[str, Any]) -> EventFile | None:
        if not self._settings.tensorboard:
            return None
        try:
            from megatron_flowrl.observe.tensorboard import EventFile
        except ImportError as error:
            raise UserError(
                f"tracking.tensorboard = true needs the package tensorboard, which cannot be imported ({error}): "
                "pip install tensorboard, or set tracking.tensorboard=false"
            ) from error
        return EventFile(folder, self._resumed + 1, settings)

    def _event(
        self,
        step: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]],
        samples: Sequence[Sample],
    ) -> bytes:
        from megatron_flowrl.observe.tensorboard import literal, step_event

        drawn = histograms if step % self._settings.histogram_interval == 0 else _NONE
        shown = [
            f"**reward {sample.reward:.4g}**\n\n{literal(sample.prompt)}\n\n---\n\n{literal(sample.response)}"
            for sample in samples
        ]
        return step_event(step, scalars, drawn, {"samples/answers": "\n\n---\n\n".join(shown)} if shown else {})

    def _report(self, errors: Mapping[GrowingFile, OSError]) -> None:
        reasons = [error.strerror or str(error) for error in errors.values()]
        reason = reasons[0] if reasons else None
        if reason is not None and reason != self._said:
            names = ", ".join(str(file.path) for file in errors)
            logger.warning("%s cannot be written: %s; training goes on, and this is lost until it can", names, reason)
        elif reason is None and self._said is not None:
            logger.info("the run is recorded again; %d lines of %s were lost", self.lost, self._metrics.path.name)
        self._said = reason


def _errors_of(pieces: Sequence[tuple[GrowingFile, bytes]]) -> dict[GrowingFile, OSError]:
    """Append each; what went wrong with which."""
    errors = {}
    for file, piece in pieces:
        try:
            file.append(piece)
        except OSError as error:
            errors[file] = error
    return errors


def _forget(path: Path, last: int) -> list[int]:
    """Drop lines of steps after `last`, and what is no whole line. Returns the steps that stay."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        steps = [_step_of(line) for line in file]
    stays = [step is not None and step <= last for step in steps]
    if not all(stays):
        with open(path, "rb") as file:
            kept = [line.decode() for line, stay in zip(file, stays, strict=True) if stay]
        write_file(path, "".join(kept))
        logger.info("%s: %d lines after step %d were dropped", path, len(stays) - sum(stays), last)
    return [step for step, stay in zip(steps, stays, strict=True) if step is not None and stay]


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, allow_nan=False) + "\n").encode()


def _sample(step: int, sample: Sample) -> dict[str, Any]:
    reward = _finite(float(sample.reward))
    return {"step": step, "prompt": sample.prompt, "response": sample.response, "reward": reward, "key": sample.key}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


__all__ = ["METRICS", "SAMPLES", "TENSORBOARD", "Recorder", "Sample"]
