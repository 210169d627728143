"""Runs a grading process for a parent, and ends it, with all that it has started, when the parent wants or ends.

    python -P guard.py FD PARENT SETTINGS SYS_PATH

FD is one end of a socket, whose other end the parent holds; SETTINGS are a RewardConfig as JSON, SYS_PATH a list. The
grading process is a fork, the leader of a session of its own, that speaks with the parent through the same socket. It
ends, and so does its process group and whatever else descends from it, when the parent shuts its end down, when the
parent ends in any way, or when it ends by itself; the exit status is its own, 128 + N where signal N ended it. That
works also while an interpreter of the grading process computes 9**9**9 and can do nothing else.

Only the standard library is imported here, and this file is run by its path: a guard costs a few megabytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

_LOOK_MILLISECONDS = 500
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _children() -> list[int]:
    """Children of this process (Linux), those that are ended but not collected included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def _end(grading: int) -> int | None:
    """Kill all descendants: orphans become this process's own children. Returns the status of `grading`, if new."""
    with contextlib.suppress(ProcessLookupError):  # where it does not lead a group yet, it is among the children
        os.killpg(grading, signal.SIGKILL)
    status = None
    while True:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            ended, its_status = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if ended == grading:
            status = its_status


def _watch(channel: socket.socket, parent: int, grading: int) -> int:
    """Wait for the parent's end or the grading process's; returns an exit status."""
    poll = select.poll()
    poll.register(channel, 0)  # a hang-up is always told
    poll.register(os.pidfd_open(grading), select.POLLIN)
    while not poll.poll(_LOOK_MILLISECONDS) and os.getppid() == parent:
        pass
    # Not waited for yet: its id cannot be another process's, and so its group's cannot.
    ended = os.waitid(os.P_PID, grading, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    status = _end(grading)
    if not ended or status is None:
        return 0
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main(descriptor: int, parent: int, settings: str, path: list[str]) -> int:
    """What the module says."""
    channel = socket.socket(fileno=descriptor)
    for number in (signal.SIGINT, signal.SIGUSR1):  # they are the trainer's; what is started here inherits this
        signal.signal(number, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    grading = os.fork()
    if grading:
        code = _watch(channel, parent, grading)
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)
        return code
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
    os.dup2(2, 1)  # what a grader prints is no output of the program that it serves
    sys.path[:] = path
    from megatron_flowrl.rewards.worker import serve

    serve(channel, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])))
