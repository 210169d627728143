"""Seconds of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """`with timers("generate"): ...`, as often as wanted, and inside one another.

    A second counts for one phase only, the innermost: the phases of a step add up to no more than the step, and can be
    stacked. `synchronize` is called where a phase begins or ends, so that work that a device has still to do counts for
    the phase that has asked for it; it costs the overlap between phases. `on_boundary` is told the phase that begins,
    or None where one ends. Of one thread.
    """

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        on_boundary: Callable[[str | None], object] = lambda _: None,
    ) -> None:
        self._synchronize, self._on_boundary = synchronize, on_boundary
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._begin = self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a phase, also one that ends in an error."""
        self._charge()
        self._on_boundary(name)
        self._open.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._charge()
            self._on_boundary(None)
            self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        """Add what was measured elsewhere: the wait for the slowest rank, what the sampler says of itself."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last reset; of one that is still open, what is over of it."""
        self._charge()
        return dict(self._seconds)

    def elapsed(self) -> float:
        """Seconds since the last reset, of phases and in between."""
        return time.perf_counter() - self._begin

    def reset(self) -> None:
        """A step begins. Open phases stay open and count from here."""
        self._charge()
        self._seconds = dict.fromkeys(self._open, 0.0)
        self._begin = self._since

    def _charge(self) -> None:
        """Give the time since the last boundary to the innermost phase."""
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


__all__ = ["Timers"]
