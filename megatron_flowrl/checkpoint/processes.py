"""The forked writers of a save: how they report, and how they do not outlive their rank."""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import signal
import sys
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it had ended before
            os._exit(1)


class ResultQueue:
    """What a forked process puts, its parent gets: through an unnamed file that both have open, with no limit."""

    def __init__(self) -> None:
        # In memory where that can be, as the disk may be full; open as long as the run.
        in_memory = hasattr(os, "memfd_create")
        self._file = os.fdopen(os.memfd_create("results") if in_memory else _unnamed_file(), "w+b")
        self._position = 0

    def put(self, item: Any) -> None:
        """Append; one process at a time."""
        os.lseek(self._file.fileno(), 0, os.SEEK_END)
        with os.fdopen(os.dup(self._file.fileno()), "wb") as file:
            pickle.dump(item, file)

    def get_nowait(self) -> Any:
        """The oldest item that has not been taken; raises queue.Empty without one."""
        size = os.fstat(self._file.fileno()).st_size
        if size <= self._position:
            raise queue.Empty
        content = os.pread(self._file.fileno(), size - self._position, self._position)
        self._position = size
        return pickle.loads(content)


def _unnamed_file() -> int:
    handle, path = tempfile.mkstemp()
    os.unlink(path)
    return handle


def install_result_queue() -> None:
    """Give Megatron's writers this queue before they make their own.

    Theirs is a process that imports the whole program anew (seconds, hundreds of megabytes a rank) and is left
    running for ever when its rank is killed. Only writers that are forked can use ours: ours are.
    """
    if not isinstance(filesystem_async._results_queue, ResultQueue):
        filesystem_async._results_queue = ResultQueue()
