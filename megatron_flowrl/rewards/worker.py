"""What runs in a grading process: items in, one at a time, and a grade for each out."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from pathlib import Path

from pydantic import TypeAdapter

from megatron_flowrl.config import RewardConfig, UserError
from megatron_flowrl.rewards.find import make_grader
from megatron_flowrl.rewards.frames import decode_item, encode_grade, encode_reply, read_frame
from megatron_flowrl.rewards.grader import Grade, Grader

MEMORY_BYTES = 4 * 2**30
"""What grading may take of address space, beyond what importing the grader has taken."""

_LONGEST_PROBLEM = 500


def serve(channel: socket.socket, settings: str) -> None:
    """Import the grader, say whether that went well, then grade until the other end closes. Ends this process.

    `settings` are a RewardConfig as JSON.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _serve(channel, TypeAdapter(RewardConfig).validate_json(settings))
    os._exit(0)  # not sys.exit: what a grader has started or registered may not hold the process up


def _serve(channel: socket.socket, settings: RewardConfig) -> None:
    try:
        grader = make_grader(settings)
    except UserError as error:
        channel.sendall(encode_reply(error=str(error)))
        return
    _limit_memory()
    channel.sendall(encode_reply(ready=os.getpid()))
    while (payload := read_frame(channel)) is not None:
        channel.sendall(encode_grade(_grade(grader, payload)))


def _grade(grader: Grader, payload: bytes) -> Grade:
    try:
        return grader([decode_item(payload)])[0]
    except BaseException as error:  # SystemExit too: a grader that calls exit() has not graded
        return Grade(0.0, problem=_in_words(error))


def _in_words(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # an error's text is the grader's own code
        text = ""
    return f"{type(error).__name__}: {text}"[:_LONGEST_PROBLEM] if text else type(error).__name__


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
