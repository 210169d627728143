"""Notices, from a run's first update on, that a rank's whole process stands still, or its node.

Such a rank can say nothing itself. So every rank writes a few times a minute into the store through which the ranks
found one another, and reads what the next rank in a ring writes: two small messages a rank, however many there are. Of
several that stand still, one after another in the ring, the first has a neighbour that does not. Where the store itself
does not answer nothing can be told, and collectives' own limits apply; a launcher that has ended is heard of otherwise
(training/notice.py).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import World

_SAY_SECONDS = 5.0
_SILENT_SECONDS = 60.0  # beyond what the watchdog leaves a rank whose interpreter is locked, which has its stacks
_CONNECT_SECONDS = 20.0
_ENDED = "ended"


class Liveness:
    """This rank's place in the ring of `name`; all ranks construct and start it together. A world of one has none.

    Its thread is a daemon: the store may keep it waiting for ever.
    """

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name
        self._next = (world.rank + 1) % world.size
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard = self._answered = time.monotonic()  # when the next rank's word, or the store, was last new
        self._host, self._over = "an unknown host", False

    def start(self) -> None:
        """Say that this rank runs, from now on."""
        if self._world.size > 1:
            self.forgive()
            self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
            self._thread.start()

    def forgive(self) -> None:
        """This process was suspended itself: what it has not heard says nothing."""
        self._heard = self._answered = time.monotonic()

    def trouble(self, now: float) -> str | None:
        """Who is silent at this time, in words."""
        silent = now - self._heard
        if self._thread is None or self._over or silent <= _SILENT_SECONDS:
            return None
        if now - self._answered > _SILENT_SECONDS / 2:  # the store is silent
            return None
        return (
            f"rank {self._next} on {self._host} has given no sign of life for {silent:.0f} s: its process or node "
            "stands still"
        )

    def close(self) -> None:
        """Say that it ends, so that its silence from now on troubles nobody."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _SAY_SECONDS)

    def _run(self) -> None:
        try:
            self._say_and_hear(PrefixStore(self._name, self._connected()))
        except Exception as error:  # a watcher that fails must not end what it watches
            logger.debug("rank %d does not see whether others live: %s", self._world.rank, error)
        finally:
            self._over = True

    def _say_and_hear(self, store: PrefixStore) -> None:
        said, host, before = 0, socket.gethostname(), ""
        self.forgive()
        while not self._stop.wait(_SAY_SECONDS if said else 0.0):
            said += 1
            store.set(str(self._world.rank), f"{said} {host}")
            word = store.get(str(self._next)).decode() if store.check([str(self._next)]) else ""
            self._answered = time.monotonic()
            if word != before:
                before, self._heard = word, self._answered
                self._host = word.partition(" ")[2]
            if word == _ENDED:
                self._over = True
        store.set(str(self._world.rank), _ENDED)

    @staticmethod
    def _connected() -> TCPStore:
        """A connection of this thread's own: one that waits for an answer lets nobody else ask."""
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False,
        )


__all__ = ["Liveness"]
