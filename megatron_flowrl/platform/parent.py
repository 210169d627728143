"""What a process hears of its parent's end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PARENT = os.getppid()


def signal_at_parents_end(number: signal.Signals | None) -> None:
    """Have the kernel send `number` to this process when its parent ends, however that happens; None: nothing.

    On Linux; elsewhere nothing happens. A process that this one forks begins without it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number or 0)


def parent_is_gone() -> bool:
    """Whether the parent that this process was started by has ended."""
    return os.getppid() != _PARENT


__all__ = ["parent_is_gone", "signal_at_parents_end"]
