"""The forked writers of a save: how they report, and how they do not outlive their rank."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_flowrl.platform.parent import signal_at_parents_end


def die_with(parent: int) -> None:
    """Have the kernel kill this process, and those it forks, when `parent`, which forked it, ends.

    On Linux; elsewhere nothing happens.
    """

    def arm() -> None:
        signal_at_parents_end(signal.SIGKILL)

    arm()
    if os.getppid() != parent:  # it had ended before
        os._exit(1)
    os.register_at_fork(after_in_child=arm)


class ResultQueue:
    """One item at a time from a forked process to its parent, of any size, through a file without a name."""

    def __init__(self) -> None:
        # In memory where that can be, as the disk may be full; open as long as the run.
        in_memory = hasattr(os, "memfd_create")
        self._file = os.fdopen(os.memfd_create("results") if in_memory else _unnamed_file(), "w+b")

    def put(self, item: Any) -> None:
        """Leave one item for the parent."""
        content, handle, position = pickle.dumps(item), self._file.fileno(), 0
        while position < len(content):
            position += os.pwrite(handle, content[position:], position)

    def get_nowait(self) -> Any:
        """Take what was put; raises queue.Empty where there is nothing. A writer that was cut off left an error."""
        handle = self._file.fileno()
        size = os.fstat(handle).st_size
        if not size:
            raise queue.Empty
        content = os.pread(handle, size, 0)
        os.ftruncate(handle, 0)
        try:
            return pickle.loads(content)
        except (pickle.UnpicklingError, EOFError) as error:
            return RuntimeError(f"what a writer said is cut off: {error}")


def _unnamed_file() -> int:
    handle, path = tempfile.mkstemp()
    os.unlink(path)
    return handle


def use_result_queue(results: ResultQueue) -> None:
    """Have the save that begins next report here. Two saves that are under way at once need a queue each.

    Megatron's own is a process that imports the whole program anew (seconds, hundreds of megabytes a rank) and is left
    running for ever when its rank is killed. Only writers that are forked can use this one: ours are.
    """
    filesystem_async._results_queue = results
