"""Notices a rank that makes no progress, says where every rank stands, and ends the run for a cluster to start anew.

A thread on each rank looks once a second whether the rank has given a sign of progress (`beat`). Where there is none
for run.hang_seconds, or a step takes run.slow_step_factor times the median of those before, it leaves word in the run's
folder; all ranks, who look there, write the stacks of their threads beside it. One that waits in a collective waits for
another: the ranks that do not are named, and the process ends, which has its launcher end the others.

Where a library holds the interpreter's lock, the thread cannot run: then faulthandler's own, which needs none, writes
the stacks and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median
from types import FrameType, TracebackType
from typing import IO, Any, Self

import torch.distributed as dist

from megatron_flowrl.config import RunConfig
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import World

EXIT_STATUS = 70
"""Of a process that was ended (EX_SOFTWARE of sysexits.h)."""

_LOOK_SECONDS = 1.0
_LOOK_AT_WORD_SECONDS = 5.0
_FOR_OTHERS_SECONDS = 20.0  # to write where they stand
_LOCKED_SECONDS = 100.0  # without the interpreter's lock
_FASTEST_SECONDS = 60.0  # a step that is shorter is never too slow
_STEPS = 50  # whose times are remembered
_WORD = "hang"


class Watchdog:
    """A context manager; all ranks construct it together. `beat` is cheap, and to be called wherever something is done.

    A step is what is between `step` and `done`: what comes in some steps only, as an evaluation, is outside.
    """

    def __init__(self, settings: RunConfig, world: World, logs: Path) -> None:
        start = [f"{time.time():.0f}"]
        dist.broadcast_object_list(start, src=0)
        self._settings, self._world, self._logs = settings, world, logs
        self._word = logs / f"{_WORD}_{start[0]}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._times: deque[float] = deque(maxlen=_STEPS)
        self._phase, self._last = "start", time.monotonic()
        self._step: float | None = None
        self._locked: IO[str]

    def beat(self, phase: str | None = None) -> None:
        """There is progress, in this phase or, where it is None, the one before."""
        self._phase, self._last = phase or self._phase, time.monotonic()

    def step(self) -> None:
        """A step begins. With the first, watching does: loading a model may take what it takes."""
        self._step = self._last = time.monotonic()
        if self._thread is None and self._settings.hang_seconds is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            self._locked = (self._logs / f"locked_rank_{self._world.rank}.txt").open("w")
            self._arm()  # now: the thread may never come to it
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def done(self) -> None:
        """It is over."""
        self._last = time.monotonic()
        if self._step is not None:
            self._times.append(self._last - self._step)
        self._step = None

    def trouble(self, now: float) -> str | None:
        """What is wrong at this time, in words."""
        idle = now - self._last
        if idle > self._limit():
            return f"no progress for {idle:.0f} s in the phase {self._phase}"
        if self._step is not None and len(self._times) >= 3:
            usual = median(self._times)
            took, most = now - self._step, max(self._settings.slow_step_factor * usual, _FASTEST_SECONDS)
            if took > most:
                return f"a step of {took:.0f} s, where the median is {usual:.0f} s, in the phase {self._phase}"
        return None

    def _limit(self) -> float:
        return self._settings.hang_seconds or float("inf")

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(_LOOK_SECONDS):
            self._arm()
            now = time.monotonic()
            trouble = self.trouble(now)
            if trouble is not None and self._tell(trouble):
                self._end()
            if now - looked > _LOOK_AT_WORD_SECONDS:
                looked = now
                if self._word.exists():  # whoever has given word ends, and the launcher ends this process
                    self._write_down(trouble or f"in the phase {self._phase}")
                    return

    def _arm(self) -> None:
        """Have the process end, with its stacks, unless this is called again in time."""
        faulthandler.dump_traceback_later(_LOCKED_SECONDS, exit=True, file=self._locked)

    def _tell(self, trouble: str) -> bool:
        """Whether this rank is the first to give word."""
        try:
            self._word.mkdir()
        except FileExistsError:
            return False
        except OSError as error:  # the disk may be the trouble
            logger.error("%s cannot be made: %s", self._word, error)
        logger.error("rank %d on %s: %s", self._world.rank, socket.gethostname(), trouble)
        self._write_down(trouble)
        return True

    def _write_down(self, trouble: str) -> None:
        """Where this rank stands, and the stacks of its threads."""
        about = {"rank": self._world.rank, "host": socket.gethostname(), "what": trouble, **self.standing()}
        try:
            with (self._word / f"rank_{self._world.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            (self._word / f"rank_{self._world.rank}.json").write_text(json.dumps(about))
        except OSError as error:
            logger.error("rank %d: %s (not written: %s)", self._world.rank, about, error)

    def standing(self) -> dict[str, Any]:
        """`collective`: the one that the main thread is in, or None; `at`: the place in this package's own code."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        collective, at = None, None
        while frame is not None:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith("distributed/distributed_c10d.py") and not name.startswith("_"):
                collective = name
            if at is None and f"{os.sep}megatron_flowrl{os.sep}" in file:
                at = f"{file.rpartition(f'{os.sep}megatron_flowrl{os.sep}')[2]}:{frame.f_lineno} ({name})"
            frame = frame.f_back
        return {"collective": collective, "at": at}

    def _end(self) -> None:
        deadline = time.monotonic() + _FOR_OTHERS_SECONDS
        while len(self._written()) < self._world.size and time.monotonic() < deadline:
            time.sleep(0.2)
        for line in conclusion(self._written(), self._world.size):
            logger.error("%s", line)
        logger.error("the stacks of all threads are in %s; the run is ended, and the same command goes on", self._word)
        os._exit(EXIT_STATUS)

    def _written(self) -> list[dict[str, Any]]:
        found = []
        for file in sorted(self._word.glob("rank_*.json")):
            try:
                found.append(json.loads(file.read_text()))
            except (OSError, ValueError):  # it is being written
                continue
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _LOOK_SECONDS)
            faulthandler.cancel_dump_traceback_later()
            self._locked.close()
            with contextlib.suppress(OSError):
                os.unlink(self._locked.name)


def conclusion(standing: list[dict[str, Any]], size: int) -> list[str]:
    """Which ranks hold the others up, by where each of them stands."""
    silent = sorted({*range(size)} - {one["rank"] for one in standing})
    lines = [f"rank {rank} has written nothing: it, or its node, is gone or cannot run" for rank in silent]
    for one in standing:
        if one["collective"] is None:
            lines.append(f"rank {one['rank']} on {one['host']} waits for no other rank: {one['what']}, at {one['at']}")
    if not lines:
        lines = [
            f"rank {one['rank']} on {one['host']} is in {one['collective']}: {one['what']}, at {one['at']}"
            for one in standing
        ]
        lines.append("all ranks wait in a collective: for one another in different ones, or for the network")
    return lines


__all__ = ["EXIT_STATUS", "Watchdog", "conclusion"]
