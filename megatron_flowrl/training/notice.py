"""A notice that the run is to end soon: SIGTERM or SIGUSR1, as a cluster gives before a time limit or a pre-emption.

The end of torchrun, without which nobody would end or restart the ranks, is a notice too (on Linux).

The signal's handler only remembers it; it may come to any rank, once or many times. All ranks ask together at the safe
points of a step, and then save and end. While rank 0 waits for answers it asks by itself, and gives the answers up:
they may be long, and the weights have not changed since the last step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import World
from megatron_flowrl.platform.parent import parent_is_gone, signal_at_parents_end

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Notice:
    """A context manager, of the main thread: the signals are handled inside. All ranks construct it together."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._device = device
        # torchrun starts its workers from its main thread; of another parent that thread may end long before it does.
        self._hears_of_launcher = world.under_torchrun and "TORCHELASTIC_RUN_ID" in os.environ
        self._given: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._taken = False

    def given(self) -> bool:
        """Whether this rank has been given one."""
        return self._given is not None

    def everywhere(self) -> bool:
        """Whether any rank has; all ranks ask together, and hear the same."""
        number = torch.tensor(self._given or 0, dtype=torch.int32, device=self._device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if int(number) and not self._taken:
            self._taken = True
            logger.warning("%s: the run is saved and ends", signal.Signals(int(number)).name)
        return bool(int(number))

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._given = self._given or signal.Signals(number)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        if self._hears_of_launcher:
            signal_at_parents_end(signal.SIGTERM)
            if parent_is_gone():
                self._given = signal.SIGTERM
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._hears_of_launcher:
            signal_at_parents_end(None)
        for number, handler in self._before.items():
            signal.signal(number, handler)


__all__ = ["SIGNALS", "Notice"]
