"""Stands where vLLM's HTTP server stands, for tests of its clients, and misbehaves as it is told to.

In this process, in a thread of its own (`StubServer`), or as a program: python stub_vllm.py PORT [DIES_AT]; the program
ends without a word when it is asked for its DIES_ATth answer (0: before it listens).

An answer goes on counting from the prompt's last token: 5, 6, 7 after 4. So one that was stopped and continued is the
same as one that was not. Held and paused requests wait, and are aborted, as vLLM's are.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

Body = dict[str, Any]
CONTROL_ROUTES = (
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update", "sleep", "wake_up",
    "collective_rpc", "update_weight_version",
)  # fmt: skip


def log_prob(token: int) -> float:
    """What the stub says of a token."""
    return -(token + 1) / 1024


def reply(tokens: list[int], reason: str = "stop", version: str = "default") -> Body:
    """A reply of vLLM's."""
    spans = [{"version": version, "start": 0, "end": len(tokens)}] if tokens else []
    content = [{"token_id": token, "logprob": log_prob(token)} for token in tokens]
    choice = {
        "token_ids": tokens, "finish_reason": reason, "logprobs": {"content": content}, "weight_versions": spans,
    }  # fmt: skip
    return {"choices": [choice]}


def always(kind: str) -> Callable[[Body], str | None]:
    """Misbehave with every request."""
    return lambda _: kind


def first(times: int, kind: str) -> Callable[[Body], str | None]:
    """Misbehave with the first requests."""
    kinds = iter([kind] * times)
    return lambda _: next(kinds, None)


class StubServer:
    """Its attributes may be set at any time.

    `fault`: what to do with a request, by its body: "error" (HTTP 500), "html", "odd" (JSON of another form), "drop"
    (the connection), "refuse" (HTTP 400), "hang", "abort" (unasked), or None: answer.
    `hold`: answers make `partial` tokens and wait, all or those of bodies that it says. `release` lets them finish.
    `tokens`: what /metrics counts, if anything; `counts`: whether it grows each time.
    `late`: requests that are still on their way when the server is paused. `well`: False, and /health never answers.
    """

    def __init__(self, port: int = 0) -> None:
        self.port, self.version, self.world_size = port, "default", 1
        self.fault: Callable[[Body], str | None] = lambda _: None
        self.hold: Callable[[Body], bool] = lambda _: False
        self.partial, self.well = 2, True
        self.asked: list[Body] = []
        self.calls: list[str] = []
        self.control_status = 200
        self.in_flight = self.most_in_flight = self.dropped = 0
        self.late: Callable[[Body], bool] = lambda _: False
        self.is_paused = False
        self.tokens: int | None = None
        self.counts = False
        self._waiting: set[asyncio.Future[str]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> StubServer:
        """Listen, in a thread, at the port that it had, if any."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.listen(), self._loop).result(10)
        return self

    def stop(self) -> None:
        """End as a process does: connections break. Safe to call twice."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def release(self) -> None:
        """Hold nothing any more."""
        self.hold = lambda _: False
        self._loop.call_soon_threadsafe(self._wake, "go on")

    async def listen(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/get_world_size", lambda _: self._json({"world_size": self.world_size}))
        app.router.add_get("/weight_info", lambda _: self._json({"weight_version": self.version}))
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/pause", self._pause)
        app.router.add_post("/resume", self._resume)
        for name in CONTROL_ROUTES:
            app.router.add_post(f"/{name}", self._control)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=4096, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _end(self) -> None:
        for connection in list(self._runner.server.connections if self._runner.server else []):
            connection.force_close()
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

    def _wake(self, why: str) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(why)

    async def _until_woken(self) -> str:
        """What ends the wait: "go on", or "abort"."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            return await future
        finally:
            self._waiting.discard(future)

    async def _json(self, content: Any) -> web.Response:
        return web.json_response(content)

    async def _health(self, _: web.Request) -> web.Response:
        while not self.well:
            await asyncio.sleep(0.01)
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        if self.tokens is None:
            return web.Response(status=404)
        self.tokens += self.counts
        names = ("prompt_tokens_total", "generation_tokens_total")
        lines = [f'vllm:{name}{{engine="0",model_name="m"}} {self.tokens}.0' for name in names]
        return web.Response(text="\n".join(["# HELP vllm:prompt_tokens_total Tokens.", *lines, ""]))

    async def _pause(self, request: web.Request) -> web.Response:
        self.calls.append(request.path_qs)
        self.is_paused = True
        if request.query["mode"] == "abort":
            self._wake("abort")
        else:
            while self.in_flight:
                await asyncio.sleep(0.002)
        return web.json_response({"status": "paused"}, status=self.control_status)

    async def _resume(self, request: web.Request) -> web.Response:
        self.calls.append(request.path_qs)
        self.is_paused = False
        self._wake("go on")
        return web.json_response({"status": "resumed"}, status=self.control_status)

    async def _control(self, request: web.Request) -> web.Response:
        self.calls.append(request.path_qs)
        body = json.loads(await request.read() or b"{}")
        self.version = body.get("weight_version", body.get("new_version", self.version))
        return web.json_response({}, status=self.control_status)

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, body: Body) -> web.Response:
        version, start, length = self.version, body["token_ids"][-1] + 1, body["sampling_params"]["max_tokens"]
        kind = self.fault(body)
        if kind == "hang":
            await asyncio.sleep(1000)
        elif kind == "drop":
            assert request.transport is not None
            request.transport.abort()
        elif kind in ("error", "refuse"):
            return web.Response(status=500 if kind == "error" else 400, text="the stub\nsays no")
        elif kind == "html":
            return web.Response(text="<html>")
        elif kind == "odd":
            return web.json_response({"choices": []})
        elif kind == "abort":
            return web.json_response(reply([], "abort"))
        while self.late(body) and not self.is_paused:
            await asyncio.sleep(0.002)
        while self.is_paused:
            if await self._until_woken() == "abort":
                return web.json_response(reply([], "abort"))
        if self.hold(body) and await self._until_woken() == "abort":
            made = min(self.partial, length)
            return web.json_response(reply(list(range(start, start + made)), "abort", version))
        return web.json_response(reply(list(range(start, start + length)), "stop", self.version))


async def _main(port: int, dies_at: int | None) -> None:
    stub = StubServer(port)
    if dies_at == 0:
        sys.exit("RuntimeError: the stub does not want to")

    def count(_: Body) -> None:
        if len(stub.asked) == dies_at:
            os._exit(9)

    stub.fault = count
    await stub.listen()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
