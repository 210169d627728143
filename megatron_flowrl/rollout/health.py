"""Looks at servers now and then: one that hangs breaks no connection."""

from __future__ import annotations

import time

from megatron_flowrl.rollout.errors import ReplyError
from megatron_flowrl.rollout.replica import Replica

_STRIKES = 3  # looks in a row that find a server not well, before a silent one is given up
_TOKENS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


class Health:
    """What was seen of one replica. `hang_seconds` 0: whether it makes tokens is not looked at."""

    def __init__(self, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._strikes = 0
        self._tokens: float | None = None
        self._since = time.monotonic()

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
        """vLLM's front end says that it is well while its engine hangs; its count of tokens does not grow then."""
        tokens = await _tokens_of(replica) if replica.asking else None
        now = time.monotonic()
        if tokens is None or tokens != self._tokens:
            self._tokens, self._since = tokens, now
        # Before its first token a server still compiles.
        limit = self._hang_seconds if tokens else max(self._hang_seconds, replica.start_timeout)
        return now - self._since > limit


async def _tokens_of(replica: Replica) -> float | None:
    """Tokens that it has read and made since it was started; None where it does not say."""
    try:
        text = await replica.control.text("/metrics")
    except ReplyError:
        return None
    values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(_TOKENS)]
    try:
        return sum(map(float, values)) if values else None
    except ValueError:
        return None


__all__ = ["Health"]
