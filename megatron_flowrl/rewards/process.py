"""A grading process as its pool holds it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from megatron_flowrl.config import RewardConfig, UserError
from megatron_flowrl.rewards.frames import decode_reply, first_frame

_GUARD = Path(__file__).with_name("guard.py")
_START_SECONDS = 120.0  # importing a grader from a busy network file system takes long
_END_SECONDS = 10.0
_CHUNK = 2**20
# Answers are graded one by one: threads of a numerical library would only take cores, and address space.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ProcessEnded(Exception):
    """The process has ended, or speaks no sense; the argument says how."""


class TimeLimit(Exception):
    """There was no answer in time."""


class Closing(Exception):
    """The pool wants no more."""


class GradingProcess:
    """Starts at once; `wait_until_ready`, then `send` and `receive`, and `end` at last."""

    def __init__(self, settings: RewardConfig, closing: int) -> None:
        """`closing` is a file descriptor: what waits here raises Closing when it can be read.

        Raises OSError where no process can be started.
        """
        self._channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", str(_GUARD), str(theirs.fileno()), str(os.getpid())]
            try:
                self._guard = subprocess.Popen(
                    [*command, json.dumps(asdict(settings)), json.dumps(sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env={**os.environ, **_ONE_THREAD},
                )
            except BaseException:
                self._channel.close()
                raise
        self._channel.setblocking(False)
        self._closing = closing
        self._received = bytearray()
        self._unsent: list[memoryview] = []
        self.graded = 0

    def wait_until_ready(self) -> None:
        """Wait for the grader to be imported.

        Raises UserError where it cannot be; ProcessEnded, TimeLimit or Closing where the process does not get so far.
        """
        reply = decode_reply(self.receive(_START_SECONDS))
        if "error" in reply:
            raise UserError(str(reply["error"]))

    def idle(self) -> bool:
        """Whether it lives and has nothing to say, as it should where nothing was asked."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        return not poll.poll(0)

    def send(self, frames: bytes) -> None:
        """Put frames in line. They go out while `receive` waits, so that a process that reads nothing holds nobody."""
        if frames:
            self._unsent.append(memoryview(frames))

    def receive(self, seconds: float) -> bytes:
        """The next frame's payload. Raises TimeLimit, ProcessEnded, or Closing."""
        deadline = time.monotonic() + seconds
        while (payload := first_frame(self._received)) is None:
            left = max(deadline - time.monotonic(), 0.0)
            poll = select.poll()
            poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            poll.register(self._closing, select.POLLIN)
            events = dict(poll.poll(left * 1000))
            if self._closing in events:
                raise Closing
            if not events:  # looked at after the deadline too: this thread may have been kept from running until then
                raise TimeLimit
            event = events.get(self._channel.fileno(), 0)
            if event & select.POLLOUT:
                self._write()
            if event & ~select.POLLOUT:
                self._read()
        return payload

    def _write(self) -> None:
        try:
            done = self._channel.send(self._unsent[0][:_CHUNK])
        except BlockingIOError:
            return
        except OSError:  # it has ended, as reading will tell, after what it has said before
            self._unsent.clear()
            return
        self._unsent[0] = self._unsent[0][done:]
        if not self._unsent[0]:
            del self._unsent[0]

    def _read(self) -> None:
        try:
            new = self._channel.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            new = b""
        if not new:
            raise ProcessEnded(self._last_words())
        self._received += new

    def _last_words(self) -> str:
        try:
            code = self._guard.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        number = -code if code < 0 else code - 128
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(number).name}"
        return f"exit status {code}"

    def end(self) -> None:
        """Kill it and all that it has started, if it still lives; returns when all is gone."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        try:
            self._guard.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # a guard that hangs; its fork goes with it
            self._guard.kill()
            self._guard.wait()
        self._channel.close()
