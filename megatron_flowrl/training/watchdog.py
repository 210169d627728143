"""Notices a rank that makes no progress, says where every rank stands, and ends the run for a cluster to start anew.

A process that stands still as a whole is seen by another rank, between steps too (training/liveness.py). Otherwise a
step's passes and updates are watched, from `step` to `done`: what waits for servers, graders or disks has time limits
of its own. A thread on each rank looks once a second whether the rank has given a sign of progress: a micro-batch
(`sign`), a pass or an update (`beat`). Where there is none for run.hang_seconds, or the step takes run.slow_step_factor
times the median of those before, it leaves word in the run's folder; all ranks, who look there, write the stacks of
their threads beside it. The ranks that are behind the others, or wait for nobody, are named, and the process ends,
which has its launcher end the others.

It may take four times run.hang_seconds in the first step, in which libraries compile and connect; and, where a rank
waits for the others at the end of a pass, almost as long as a collective may: a rank that hangs says so itself.

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

from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import World
from megatron_flowrl.training.liveness import Liveness

EXIT_STATUS = 70
"""Of a process that was ended (EX_SOFTWARE of sysexits.h)."""

_LOOK_SECONDS = 1.0
_LOOK_AT_WORD_SECONDS = 5.0
_FOR_OTHERS_SECONDS = 20.0  # to write where they stand
_LOCKED_SECONDS = 50.0  # without the interpreter's lock
_SUSPENDED_SECONDS = 30.0  # between two looks
_FASTEST_SECONDS = 60.0  # a step that is shorter is never too slow
_FIRST_FACTOR = 4.0  # more time for the first step
_STEPS = 50  # whose times are remembered
_WORD, _LOCKED = "hang", "locked"


class Watchdog:
    """A context manager; all ranks construct it together. `beat` is cheap, and to be called wherever something is done.

    `hang_seconds` 0: nothing is watched. `beat` may be called outside of a step, too, and does nothing there.
    """

    def __init__(
        self, hang_seconds: float, wait_seconds: float, slow_step_factor: float, world: World, logs: Path
    ) -> None:
        start = [f"{time.time():.0f}"]
        dist.broadcast_object_list(start, src=0)
        self._hang_seconds, self._wait_seconds = hang_seconds, wait_seconds
        self._slow_step_factor, self._waiting = slow_step_factor, False
        self._world, self._logs = world, logs
        self._word = logs / f"{_WORD}_{start[0]}"
        self._liveness = Liveness(world, self._word.name)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._times: deque[float] = deque(maxlen=_STEPS)
        self._phase, self._last, self._beats = "start", time.monotonic(), 0
        self._step: float | None = None
        self._locked: IO[str]

    def beat(self, phase: str | None = None) -> None:
        """There is progress, in this phase or, where it is None, the one before."""
        self._phase, self._beats = phase or self._phase, self._beats + 1
        self.sign()

    def sign(self, waiting: bool = False) -> None:
        """As `beat`, where ranks need not be equally far: stages of a pipeline are ahead of one another.

        `waiting`: this rank is done, and waits for the others, which may take `wait_seconds`.
        """
        self._last, self._waiting = time.monotonic(), waiting

    def step(self) -> None:
        """A step's passes and updates begin."""
        self._last = time.monotonic()
        self._step = self._last
        if self._thread is None and self._hang_seconds:
            self._logs.mkdir(parents=True, exist_ok=True)
            for left in self._logs.glob(f"{_LOCKED}_*_rank_{self._world.rank}.txt"):  # of starts that were killed
                with contextlib.suppress(OSError):
                    if not left.stat().st_size:
                        left.unlink()
            self._locked = (self._logs / f"{_LOCKED}_{self._word.name}_rank_{self._world.rank}.txt").open("w")
            self._arm()  # now: the thread may never come to it
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            threading.Thread(target=self._look, name="watchdog's word", daemon=True).start()
            self._liveness.start()

    def done(self, trained: bool = True) -> None:
        """They are over. `trained`: whether there was anything to do, which else says nothing of a step's time."""
        self.beat()
        if self._step is not None and trained:
            self._times.append(self._last - self._step)
        self._step = None

    def trouble(self, now: float) -> str | None:
        """What is wrong at this time, in words."""
        began, last, phase = self._step, self._last, self._phase  # the main thread changes them
        if began is None:
            return None
        limit = self._hang_seconds * (1 if self._times else _FIRST_FACTOR)
        if now - last > (max(limit, self._wait_seconds) if self._waiting else limit):
            return f"no progress for {now - last:.0f} s in the phase {phase}"
        if len(self._times) >= 3:
            usual = median(list(self._times))
            if now - began > max(self._slow_step_factor * usual, _FASTEST_SECONDS):
                return f"a step of {now - began:.0f} s, where the median is {usual:.0f} s, in the phase {phase}"
        return None

    def _watch(self) -> None:
        """Touches no disk while all is well: one that hangs must not look like a rank that does."""
        before = time.monotonic()
        while not self._stop.wait(_LOOK_SECONDS):
            self._arm()
            now = time.monotonic()
            if now - before > _SUSPENDED_SECONDS:  # this process, or its machine, was suspended
                self._last = now
                self._liveness.forgive()
            before = now
            trouble = self.trouble(now) or self._liveness.trouble(now)
            if trouble is not None and self._tell(trouble):
                self._end()

    def _look(self) -> None:
        """For another rank's word."""
        while not self._stop.wait(_LOOK_AT_WORD_SECONDS):
            with contextlib.suppress(OSError):
                if self._word.exists():
                    self._write_down(self.trouble(time.monotonic()) or f"in the phase {self._phase}")
                    return  # whoever has given word ends, and the launcher ends this process

    def _arm(self) -> None:
        """Have the process end, with its stacks, unless this is called again in time."""
        faulthandler.dump_traceback_later(_LOCKED_SECONDS, exit=True, file=self._locked)

    def _tell(self, trouble: str) -> bool:
        """Whether this rank is the first to give word."""
        try:
            self._word.mkdir()
        except FileExistsError:
            return False
        except OSError as error:  # the disk may be the trouble: nobody else will hear of it
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
        """`beats`: how far it is; `collective`: the one that the main thread is in, or None (on a GPU also where it
        waits for the device, which waits for others); `at`: the place in this package's own code."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        collective, at = None, None
        while frame is not None:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith("distributed/distributed_c10d.py") and not name.startswith("_"):
                collective = name
            if at is None and f"{os.sep}megatron_flowrl{os.sep}" in file:
                at = f"{file.rpartition(f'{os.sep}megatron_flowrl{os.sep}')[2]}:{frame.f_lineno} ({name})"
            frame = frame.f_back
        return {"beats": self._beats, "collective": collective, "at": at}

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
        self._liveness.close()
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
    least = min((one["beats"] for one in standing), default=0)
    behind = [one for one in standing if one["beats"] == least]
    if len(behind) == len(standing):  # all equally far: who waits for nobody holds the others up, unless one is silent
        behind = [one for one in standing if one["collective"] is None and not silent]
        why = "waits for no other rank"
    else:
        why = "is behind the others"
    lines += [f"rank {one['rank']} on {one['host']} {why}: {one['what']}, at {one['at']}" for one in behind]
    if not lines:
        lines = [
            f"rank {one['rank']} on {one['host']} is in {one['collective']}: {one['what']}, at {one['at']}"
            for one in standing
        ]
        lines.append("all ranks wait in a collective: for one another in different ones, or for the network")
    return lines


__all__ = ["EXIT_STATUS", "Watchdog", "conclusion"]
