"""Two ranks under a watchdog, of which the second stops: in Python, with the interpreter's lock held, or as a whole."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_flowrl.config import LoggingConfig
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform.distributed import read_world
from megatron_flowrl.training import liveness, watchdog


def stands_still() -> None:
    """For longer than the test."""
    time.sleep(300)


def main(logs: Path, how: str) -> None:
    """Step after step; in the fifth rank 1 hangs."""
    if how == "locked":
        watchdog._LOCKED_SECONDS = 8.0
    if how == "stopped":
        liveness._SAY_SECONDS, liveness._SILENT_SECONDS, watchdog._FOR_OTHERS_SECONDS = 0.5, 8.0, 3.0
    dist.init_process_group("gloo")
    world = read_world()
    configure_logging(LoggingConfig(), world.rank)
    with watchdog.Watchdog(10.0, 10.0, 10.0, world, logs) as watch:
        for step in range(10):
            if step == 4 and how == "stopped":  # between two steps
                if world.rank == 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                stands_still()
            watch.step()
            watch.beat("update")
            if step == 4 and world.rank == 1:
                if how == "python":
                    stands_still()
                ctypes.PyDLL(None).sleep(300)  # a PyDLL keeps the lock
            dist.all_reduce(torch.ones(1))
            watch.done()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
