"""The processes of a run, and what each of them is."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "CHAOS_RUN"
"""Environment variable that all processes of a run have, as those of a cluster's job have its number."""

_LAUNCHER = "torch.distributed.run"
_STANDARD = "multiprocessing.resource_tracker"


@dataclass(frozen=True)
class Process:
    """A living process."""

    id: int
    parent: int
    command: str
    marked: bool


def processes_of(mark: str) -> dict[str, list[Process]]:
    """Living processes of the run that has this mark, and what they have started, by kind."""
    everything = {process.id: process for process in _everything(f"{MARK}={mark}".encode())}
    own = {number for number, process in everything.items() if process.marked}
    while more := {number for number, process in everything.items() if process.parent in own} - own:
        own |= more
    kinds: dict[str, list[Process]] = {}
    for number in sorted(own):
        kinds.setdefault(_kind(everything[number], everything), []).append(everything[number])
    return kinds


def end_all(mark: str, seconds: float) -> list[str]:
    """Wait for the run's processes to end by themselves, then kill the rest, as a cluster does; the kinds of those.

    Before that they are asked where they stand: with PYTHONFAULTHANDLER SIGABRT writes Python's stacks to the log.
    """
    deadline = time.monotonic() + seconds
    while processes_of(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = processes_of(mark)
    if left and seconds:
        for process in (one for kind in ("rank", "writer") for one in left.get(kind, [])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.id, signal.SIGABRT)
        time.sleep(2.0)
    while found := processes_of(mark):
        for process in (one for many in found.values() for one in many):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.id, signal.SIGKILL)
        time.sleep(0.1)
    return sorted(left)


def _kind(process: Process, everything: dict[int, Process]) -> str:
    parent = everything.get(process.parent)
    if _STANDARD in process.command:
        return "resource tracker"
    if _LAUNCHER in process.command:
        return "launcher"
    if "megatron_flowrl.rollout.guard" in process.command:
        return "engine guard"
    if "vllm" in process.command:
        return "engine front end"
    if "spawn_main" in process.command:  # vLLM names its processes where setproctitle is installed alone
        return "engine core" if parent is not None and "vllm" in parent.command else "engine worker"
    if "rewards/guard.py" in process.command:
        return "grader" if parent is not None and "rewards/guard.py" in parent.command else "grader guard"
    if "megatron_flowrl" in process.command:
        forked = parent is not None and "megatron_flowrl" in parent.command and _LAUNCHER not in parent.command
        return "writer" if forked else "rank"  # also one whose launcher has ended
    return "other"


def _everything(mark: bytes) -> Iterator[Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            stat = (folder / "stat").read_text()
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state in "ZX":
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            marked = mark in (folder / "environ").read_bytes().split(b"\0")
            yield Process(int(folder.name), int(parent), command, marked)


__all__ = ["MARK", "Process", "end_all", "processes_of"]
