"""Looks at servers now and then: one that hangs breaks no connection.

vLLM's front end says that it is well while its engine hangs; the count of tokens in its metrics does not grow then.
"""

from __future__ import annotations

import time
from contextlib import suppress

from megatron_flowrl.rollout.errors import ReplyError
from megatron_flowrl.rollout.replica import Replica

_STRIKES = 3  # looks in a row that find a server not well, before a silent one is given up
_RUNNING = "vllm:num_requests_running"
_TOKENS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


def hang_seconds_of(given: float | None, gpus: int) -> float:
    """rollout.hang_seconds or its default: a GPU makes tokens all the time; a CPU may read a prompt for minutes."""
    return given if given is not None else 90.0 if gpus else 600.0


class Standstill:
    """Of one server that may not go for `hang_seconds` without a token, or for `start_seconds` before its first."""

    def __init__(self, hang_seconds: float, start_seconds: float) -> None:
        self._hang_seconds, self._start_seconds = hang_seconds, start_seconds
        self._tokens: float | None = None
        self._since = time.monotonic()

    def seen(self, tokens: float | None, now: float) -> bool:
        """Whether it stands still. `tokens`: read and made until now; None: it had nothing to do, or nobody knows."""
        if tokens is None or tokens != self._tokens:
            self._tokens, self._since = tokens, now
        # Before its first token a server still compiles.
        return now - self._since > (self._hang_seconds if tokens else max(self._hang_seconds, self._start_seconds))


class Health:
    """What was seen of one replica. `hang_seconds` 0: whether it makes tokens is not looked at."""

    def __init__(self, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._strikes = 0
        self._standstill: Standstill | None = None

    async def look(self, replica: Replica) -> str | None:
        """Why it is to be given up, after a word like its name; None where it is well, or may be."""
        if replica.process is not None and not replica.process.is_running():
            return "has ended"
        self._strikes = 0 if await replica.is_well() else self._strikes + 1
        if self._strikes >= _STRIKES:
            return "does not say that it is well any more"
        if self._hang_seconds and await self._stands_still(replica):
            replica.hung = True
            return f"has made no token in {self._hang_seconds:.0f} s though it was asked to (rollout.hang_seconds)"
        return None

    async def _stands_still(self, replica: Replica) -> bool:
        if self._standstill is None:
            self._standstill = Standstill(self._hang_seconds, replica.start_timeout)
        tokens = None
        if replica.asking:
            with suppress(ReplyError):
                tokens = _sum_of(await replica.control.text("/metrics"), _TOKENS)
        return self._standstill.seen(tokens, time.monotonic())


def tokens_under_way(metrics: str) -> float | None:
    """Tokens that a server has read and made since it was started; None where it has nothing to do, or does not say."""
    return _sum_of(metrics, _TOKENS) if _sum_of(metrics, (_RUNNING,)) else None


def _sum_of(metrics: str, names: tuple[str, ...]) -> float | None:
    values = [line.rpartition(" ")[2] for line in metrics.splitlines() if line.startswith(names)]
    try:
        return sum(map(float, values)) if values else None
    except ValueError:
        return None


__all__ = ["Health", "Standstill", "hang_seconds_of", "tokens_under_way"]
