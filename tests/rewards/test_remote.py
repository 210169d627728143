"""A grader behind HTTP: what is sent, and what becomes of replies that are none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from megatron_flowrl.config import RewardConfig, UserError
from megatron_flowrl.rewards.find import check_ground_truth, make_grader
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import TIME_LIMIT, GraderPool

Reply = Callable[[Any], tuple[int, bytes]]


@pytest.fixture
def server() -> Iterator[Any]:
    """`server(reply)` is the address of one that answers each message by reply(message)."""
    running: list[HTTPServer] = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = reply(message)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        running.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/grade"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def graded(url: str, item: Item) -> Grade:
    return make_grader(RewardConfig(grader="remote", url=url))([item])[0]


def test_all_of_an_item_is_sent_and_a_grade_comes_back(server: Any) -> None:
    seen = []

    def reply(message: Any) -> tuple[int, bytes]:
        seen.append(message)
        return 200, b'{"grades": [{"score": 0.5, "key": "k"}]}'

    item = Item("ans\u00e9", {"a": [1]}, "why", {"column": 2}, "length")
    assert graded(server(reply), item) == Grade(0.5, "k")
    sent = {"response": "ans\u00e9", "ground_truth": {"a": [1]}, "prompt": "why", "row": {"column": 2}}
    assert seen == [{"items": [sent | {"finish_reason": "length"}]}]
    assert graded(server(lambda _: (200, b'{"scores": [1]}')), item) == Grade(1.0)
    found = graded(server(lambda _: (200, b'{"grades": [{"problem": "cannot"}]}')), item)
    assert found == Grade(0.0, None, "cannot")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b"no such task", "answered status 400: no such task"),
        (200, b"<html>", "answered no JSON: b'<html>'"),
        (200, b"[]", "and not a list of one grade"),
        (200, b'{"scores": [1, 2]}', "and not a list of one grade"),
        (200, b'{"scores": ["high"]}', "answered 'high', which has no score"),
    ],
)
def test_a_reply_that_is_none_is_the_items_problem(server: Any, status: int, body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graded(server(lambda _: (status, body)), Item("x", "x"))


def test_a_server_that_is_busy_is_asked_again(server: Any) -> None:
    replies = iter([(503, b"starting"), (429, b"busy"), (200, b'{"scores": [1.0]}')])
    assert graded(server(lambda _: next(replies)), Item("x", "x")) == Grade(1.0)


def test_one_that_never_answers_costs_the_time_limit(server: Any) -> None:
    url = server(lambda _: (500, b"broken"))
    settings = RewardConfig(grader="remote", url=url, workers=1, timeout_seconds=1.0, failed_score=-1.0)
    with GraderPool(settings) as pool:
        assert pool.grade([Item("x", "x")]) == [Grade(-1.0, None, TIME_LIMIT)]


@pytest.mark.parametrize("url", [None, "localhost:8080", "ftp://host/x", "http://", "http://host:port/"])
def test_what_is_no_address_is_refused(url: str | None) -> None:
    with pytest.raises(UserError, match=r"reward\.url = .* is no address; give one, such as http://"):
        make_grader(RewardConfig(grader="remote", url=url))


def test_a_ground_truth_that_cannot_be_sent() -> None:
    assert "cannot be sent as JSON" in str(check_ground_truth("remote", {1, 2}))
    assert check_ground_truth("remote", {"any": ["thing"]}) is None
