"""JSON over HTTP from one event loop in a thread of its own: thousands of requests wait there without a thread each."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import aiohttp

from megatron_flowrl.rollout.errors import BadReply, Refused, Unreachable

_T = TypeVar("_T")
_EXCERPT = 500
_CONNECT_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 3.0  # below the 5 s after which vLLM's server closes an idle connection


class HttpLoop:
    """The event loop and its HTTP session. `close` ends both; what is still waiting is cancelled."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        """`headers` go with every request."""
        self._headers = dict(headers or {})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-http", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession = self.run(self._open())

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the loop, from another thread, and wait for its result."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Run a coroutine in the loop, from any thread, without waiting."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def get(self, url: str, *, timeout: float) -> Any:
        """The JSON of a reply, None for an empty one. Raises Refused, Unreachable or BadReply, which name the url."""
        return await self._ask("GET", url, None, timeout)

    async def text(self, url: str, *, timeout: float) -> str:
        """As `get`, for a reply that is text."""
        return (await self._content("GET", url, None, timeout)).decode(errors="replace")

    async def post(self, url: str, body: object = None, *, timeout: float) -> Any:
        """As `get`, for a POST of JSON."""
        return await self._ask("POST", url, body, timeout)

    def close(self) -> None:
        """End the session, the loop and the thread; safe to call twice."""
        if self._loop.is_closed():
            return
        self.run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask(self, method: str, url: str, body: object, timeout: float) -> Any:
        content = await self._content(method, url, body, timeout)
        if not content.strip():
            return None
        try:
            return json.loads(content)
        except ValueError:
            raise BadReply(f"{url} did not answer JSON: {_excerpt(content)}") from None

    async def _content(self, method: str, url: str, body: object, timeout: float) -> bytes:
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=_CONNECT_SECONDS)
        try:
            async with self._session.request(method, url, json=body, timeout=limits) as reply:
                status, content = reply.status, await reply.read()
        except aiohttp.ConnectionTimeoutError:
            seconds = min(timeout, _CONNECT_SECONDS)
            raise Unreachable(f"{url} cannot be reached: no connection within {seconds:g} s") from None
        except TimeoutError:
            raise Unreachable(f"{url} did not answer within {timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{url} cannot be reached: {error or type(error).__name__}") from error
        if status >= 500:
            raise BadReply(f"{url} failed with HTTP status {status}: {_excerpt(content)}")
        if status >= 400:
            raise Refused(f"{url} refused with HTTP status {status}: {_excerpt(content)}")
        return content

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
        return aiohttp.ClientSession(connector=connector, headers=self._headers)

    async def _shut(self) -> None:
        waiting = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._session.close()


def _excerpt(content: bytes) -> str:
    text = " ".join(content.decode(errors="replace").split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + " ..."
