"""JSON over HTTP: what comes back, what is raised for what goes wrong, and that closing ends all of it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest

from megatron_flowrl.rollout import http as http_module
from megatron_flowrl.rollout.errors import BadReply, Refused, Unreachable
from megatron_flowrl.rollout.http import HttpLoop
from tests.rollout.stub_vllm import StubServer, always
from tests.rollout.test_server import wait_for

GENERATE = "/inference/v1/generate"
BODY = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}}


@pytest.fixture
def http() -> Iterator[HttpLoop]:
    one = HttpLoop()
    yield one
    one.close()


@pytest.fixture
def server(stub: Callable[[], StubServer]) -> StubServer:
    return stub()


def test_json_goes_out_and_comes_back(http: HttpLoop, server: StubServer) -> None:
    assert http.run(http.get(server.url + "/get_world_size", timeout=10.0)) == {"world_size": 1}
    assert http.run(http.get(server.url + "/health", timeout=10.0)) is None
    answer = http.run(http.post(server.url + GENERATE, BODY, timeout=10.0))
    assert answer["choices"][0]["token_ids"] == [3] and server.asked == [BODY]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("error", BadReply, "failed with HTTP status 500: the stub says no"),
        ("refuse", Refused, "refused with HTTP status 400: the stub says no"),
        ("html", BadReply, "did not answer JSON: <html>"),
        ("drop", Unreachable, "cannot be reached: "),
        ("hang", Unreachable, r"did not answer within 0\.2 s"),
    ],
)
def test_what_goes_wrong_names_the_url(
    kind: str, error: type[Exception], message: str, http: HttpLoop, server: StubServer
) -> None:
    server.fault = always(kind)
    with pytest.raises(error, match=f"^{server.url}{GENERATE} {message}"):
        http.run(http.post(server.url + GENERATE, BODY, timeout=0.2 if kind == "hang" else 10.0))


def test_a_route_that_does_not_exist_is_refused(http: HttpLoop, server: StubServer) -> None:
    with pytest.raises(Refused, match=f"^{server.url}/nothing refused with HTTP status 404"):
        http.run(http.get(server.url + "/nothing", timeout=10.0))


def test_nothing_that_listens_cannot_be_reached(http: HttpLoop, server: StubServer) -> None:
    server.stop()
    with pytest.raises(Unreachable, match=f"^{server.url}/health cannot be reached: "):
        http.run(http.get(server.url + "/health", timeout=10.0))
    with pytest.raises(Unreachable, match=r"^not an address/health cannot be reached: "):
        http.run(http.get("not an address/health", timeout=10.0))


def test_a_connection_that_is_not_taken_is_not_an_answer_that_is_late(
    http: HttpLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "_CONNECT_SECONDS", 0.2)
    with socket.socket() as full, socket.socket() as first:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        first.connect(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/health"
        with pytest.raises(Unreachable, match=rf"^{url} cannot be reached: .*0\.2 s"):
            http.run(http.get(url, timeout=10.0))


def test_closing_cancels_what_waits_and_ends_the_thread(server: StubServer) -> None:
    server.fault = always("hang")
    before = threading.active_count()
    one = HttpLoop()
    waiting = [one.start(one.post(server.url + GENERATE, BODY, timeout=1000.0)) for _ in range(20)]
    wait_for(lambda: server.in_flight == 20)
    one.close()
    assert all(future.cancelled() for future in waiting)
    assert threading.active_count() == before
    wait_for(lambda: server.in_flight == 0)
    one.close()


def test_a_thread_that_waits_hears_of_the_end(server: StubServer) -> None:
    server.fault = always("hang")
    one, heard = HttpLoop(), []

    def wait() -> None:
        try:
            one.run(one.post(server.url + GENERATE, BODY, timeout=1000.0))
        except (CancelledError, asyncio.CancelledError) as error:
            heard.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: server.in_flight == 1)
    one.close()
    thread.join(10.0)
    assert len(heard) == 1
