"""One server in a fleet: the process behind it, where there is one of ours, and what may be asked of it now."""

from __future__ import annotations

import asyncio
import time
from enum import Enum

from megatron_flowrl.rollout.control import SHORT_SECONDS, ServerControl
from megatron_flowrl.rollout.errors import ReplyError, ServerError
from megatron_flowrl.rollout.generation import ROUTE, Job, Sampling
from megatron_flowrl.rollout.http import HttpLoop
from megatron_flowrl.rollout.server import VllmServer

_POLL_SECONDS = 0.5
_ONE_TOKEN = Job(0, 0, (1,), Sampling(max_tokens=1))


class State(Enum):
    """What a replica is good for."""

    READY = "ready"  # takes prompts
    PAUSED = "paused"  # takes none for now: its weights are being changed, or it sleeps
    DOUBTED = "doubted"  # a request has failed: it is being looked at
    STALE = "stale"  # it runs, with other weights than the fleet's
    DOWN = "down"  # it is being started again, or waited for
    LOST = "lost"  # given up


class Replica:
    """A server of ours (`process`), or one that somebody else keeps running at `url`."""

    def __init__(
        self, http: HttpLoop, target: VllmServer | str, *, window: int, control_timeout: float, start_timeout: float
    ) -> None:
        self.process = target if isinstance(target, VllmServer) else None
        self._http, self._control_timeout, self.start_timeout = http, control_timeout, start_timeout
        self.control = self._control(target.url if isinstance(target, VllmServer) else target.rstrip("/"))
        self.state = State.DOWN
        self.window = window
        self.restarts = 0
        self.hung = False  # its front end said that it was well when it was given up
        self.asking: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it answers now."""
        return self.control.url

    @property
    def room(self) -> int:
        """Answers it may be asked for beside those it works on."""
        return self.window - len(self.asking) if self.state is State.READY else 0

    async def start(self) -> None:
        """Have it run and ready, with the weights it starts with. Raises ServerError."""
        if self.process is not None:
            await asyncio.to_thread(self.process.start)
            await self._ready(self.process)
        else:
            await self._wait_for_other()

    async def start_again(self) -> None:
        """End what is left of it and start it anew, elsewhere if its port was any. Raises ServerError."""
        self.restarts += 1
        if self.process is not None:
            await asyncio.to_thread(self.process.stop)
            await asyncio.to_thread(self.process.start_again)
            self.control = self._control(self.process.url)
            await self._ready(self.process)
        else:
            self.control = self._control(self.url)
            await self._wait_for_other(answers=self.hung)
        self.hung = False

    async def is_well(self) -> bool:
        """Whether it runs and says so."""
        if self.process is not None and not self.process.is_running():
            return False
        try:
            await self.control.get("/health")
        except ReplyError:
            return False
        return True

    async def has_given_weights(self) -> bool:
        """Whether its weights still are those it was given; a server that was started again by others has lost them."""
        given = self.control.weight_version
        return given is None or given == await self.control.reported_version()

    def describe_end(self) -> str:
        """What its log says at the end, where it is ours."""
        return "" if self.process is None else self.process.last_words()

    def _control(self, url: str) -> ServerControl:
        return ServerControl(self._http, url, timeout=self._control_timeout)

    @staticmethod
    async def _ready(process: VllmServer) -> None:
        await asyncio.to_thread(process.wait_until_ready)

    async def _wait_for_other(self, *, answers: bool = False) -> None:
        """`answers`: also until it makes a token. A front end says that it is well though its engine hangs."""
        deadline = time.monotonic() + self.start_timeout
        while True:
            try:
                await self.control.get("/health")
                await self.control.world_size()
                if answers:
                    await self.control.post(ROUTE, _ONE_TOKEN.body(), timeout=SHORT_SECONDS)
                return
            except ReplyError as error:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"{error}; generation.urls names it: start it (megatron-flowrl serve), or leave it out"
                    ) from error
            await asyncio.sleep(_POLL_SECONDS)
