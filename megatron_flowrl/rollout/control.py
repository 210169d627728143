"""The control routes of one vLLM server: pausing, weight updates, sleeping. The order of calls is their caller's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from megatron_flowrl.rollout.errors import BadReply, ReplyError
from megatron_flowrl.rollout.http import HttpLoop

SHORT_SECONDS = 30.0


class ServerControl:
    """One server as it was started once: what it has met and been given since.

    `weight_version` is that of the weights it was given last (None: those it started with).
    """

    def __init__(self, http: HttpLoop, url: str, *, timeout: float) -> None:
        self.http, self.url, self.timeout = http, url, timeout
        self.weight_version: str | None = None
        self.has_met = False

    async def get(self, route: str) -> Any:
        """GET; see HttpLoop.get for what is raised."""
        return await self.http.get(self.url + route, timeout=SHORT_SECONDS)

    async def text(self, route: str) -> str:
        """GET of text; see HttpLoop.get for what is raised."""
        return await self.http.text(self.url + route, timeout=SHORT_SECONDS)

    async def post(self, route: str, body: object = None, *, timeout: float | None = None) -> Any:
        """POST; see HttpLoop.get for what is raised."""
        return await self.http.post(self.url + route, body, timeout=self.timeout if timeout is None else timeout)

    async def pause(self, mode: str) -> None:
        """Schedule nothing more, when what runs is done ("wait") or at once ("abort"), and empty the prefix cache."""
        await self.post(f"/pause?mode={mode}&clear_cache=true")

    async def resume(self) -> None:
        """Go on scheduling."""
        await self.post("/resume")

    async def world_size(self) -> int:
        """Workers behind this address."""
        size = _value(await self.get("/get_world_size"), "world_size", f"{self.url}/get_world_size")
        if type(size) is not int or size < 1:
            raise BadReply(f"{self.url}/get_world_size answered world_size = {size!r}")
        return size

    async def reported_version(self) -> str:
        """What the server says its weights are."""
        return str(_value(await self.get("/weight_info"), "weight_version", f"{self.url}/weight_info"))

    async def init_weight_transfer_engine(self, info: Mapping[str, Any]) -> None:
        """The handshake of a transfer; on some back ends it returns when both sides have met."""
        await self.post("/init_weight_transfer_engine", {"init_info": dict(info)})

    async def start_weight_update(self) -> None:
        """Make the workers ready for new weights."""
        await self.post("/start_weight_update")

    async def update_weights(self, info: Mapping[str, Any]) -> None:
        """Have the workers take (some of) the weights; returns when they are loaded."""
        await self.post("/update_weights", {"update_info": dict(info)})

    async def finish_weight_update(self, version: str) -> None:
        """All weights are there: they are `version` from now on."""
        await self.post("/finish_weight_update", {"weight_version": version})
        self.weight_version = version

    async def give_weights(self, info: Mapping[str, Any], version: str) -> None:
        """A whole update, where nothing else has to happen between its parts."""
        await self.start_weight_update()
        await self.update_weights(info)
        await self.finish_weight_update(version)

    async def sleep(self) -> None:
        """Give the GPU's memory back, weights and key-value cache; the next weights come from the trainer."""
        await self.post("/sleep?level=2")

    async def wake_up(self, what: str) -> None:
        """Take memory for "weights" or "kv_cache" again."""
        await self.post(f"/wake_up?tags={what}")


async def on_each(
    servers: Sequence[ServerControl], action: Callable[[ServerControl], Awaitable[Any]]
) -> dict[str, ReplyError]:
    """Do it on all servers at once; what went wrong, by address."""

    async def attempt(server: ServerControl) -> ReplyError | None:
        try:
            await action(server)
        except ReplyError as error:
            return error
        return None

    troubles = await asyncio.gather(*map(attempt, servers))
    return {server.url: trouble for server, trouble in zip(servers, troubles, strict=True) if trouble is not None}


def _value(reply: Any, name: str, where: str) -> Any:
    if not isinstance(reply, dict) or name not in reply:
        raise BadReply(f"{where} answered without {name!r}: {str(reply)[:200]}")
    return reply[name]
