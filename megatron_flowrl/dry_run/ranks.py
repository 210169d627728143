"""Work on several gloo ranks that are forked from this process, which has loaded the libraries for all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_LOOK_SECONDS = 0.1
_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed


class RanksFailed(Exception):
    """A rank ended with an error, or not in time; the text is why, and the end of what it said."""


def run_ranks(work: Callable[[], object], ranks: int, logs: Path, timeout: float) -> str:
    """What rank 0 says, with torchrun's variables set for each. Leaves no process behind. Raises RanksFailed."""
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"rank_{rank}.log" for rank in range(ranks)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=_rank, args=(work, rank, ranks, port, file)) for rank, file in enumerate(files)]
    sys.stdout.flush()
    sys.stderr.flush()
    for process in processes:
        process.start()
    try:
        failed = _wait(processes, timeout)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
    if failed is not None:
        raise RanksFailed(f"{failed[1]}:\n{_end(files[failed[0]])}")
    return files[0].read_text(errors="replace")


def _wait(processes: Sequence[BaseProcess], timeout: float) -> tuple[int, str] | None:
    """The rank that failed first, and how; None where all have ended well."""
    deadline, failed = time.monotonic() + timeout, None
    while running := [process for process in processes if process.is_alive()]:
        if failed is None:
            failed = next(((rank, f"rank {rank} failed") for rank, p in enumerate(processes) if p.exitcode), None)
            if failed is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            late = f"rank {processes.index(running[0])} did not end in {timeout:.0f} s"
            return failed or (processes.index(running[0]), late)
        time.sleep(_LOOK_SECONDS)
    return failed or next(((rank, f"rank {rank} failed") for rank, p in enumerate(processes) if p.exitcode), None)


def _rank(work: Callable[[], object], rank: int, ranks: int, port: int, log: Path) -> None:
    os.setsid()  # whatever it starts can be ended with it
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Open until the process ends: what stood here may be a stream of its parent's, such as pytest's.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work()


def _end(log: Path, most: int = 4000) -> str:
    return log.read_text(errors="replace")[-most:].strip()


__all__ = ["RanksFailed", "run_ranks"]
