"""What watches a run from outside its arithmetic: notice that it is to end, and a rank that hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_flowrl.training.journal import RunFolder
from megatron_flowrl.training.notice import Notice
from megatron_flowrl.training.session import Session
from megatron_flowrl.training.watchdog import Watchdog

_HANG_SECONDS = 90.0  # on a GPU, where a micro-batch takes seconds
_SHARE = 0.8  # of the time in which a collective gives up


@dataclass(frozen=True)
class Oversight:
    """Both of them, of one run."""

    notice: Notice
    watchdog: Watchdog

    def on_wait(self) -> bool:
        """For who waits for servers, which have time limits of their own: that is no hang. Whether to stop waiting."""
        self.watchdog.beat()
        return self.notice.given()


@contextmanager
def overseen(session: Session) -> Iterator[Oversight]:
    """All ranks enter it together, on their main threads."""
    config, logs = session.config, RunFolder(session.config).logs
    wait = _SHARE * 60 * config.parallel.distributed_timeout_minutes
    seconds = config.run.hang_seconds
    if seconds is None:
        seconds = min(wait, _HANG_SECONDS) if session.platform.is_cuda else wait
    watchdog = Watchdog(seconds, wait, config.run.slow_step_factor, session.world, logs)
    with Notice(session.world, session.platform.device) as notice, watchdog:
        yield Oversight(notice, watchdog)


__all__ = ["Oversight", "overseen"]
