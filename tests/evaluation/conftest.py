"""A stand-in for a server with OpenAI's chat completions."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Chat:
    """Answers 1 + 1 always right, 1 / 2 at every second time; `trouble` says what else to do."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.fail_from: int | None = None
        self.says: list[str] = []  # instead, one after another
        self.statuses: list[int] = []  # of the first replies
        self._times = Counter[str]()
        self._lock = threading.Lock()

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.asked.append(body)
            if self.fail_from is not None and len(self.asked) > self.fail_from:
                return 500, {"error": "broken"}
            if self.statuses:
                return self.statuses.pop(0), {"error": "no"}
            if self.says:
                return 200, {"choices": [{"message": {"content": self.says.pop(0)}, "finish_reason": "stop"}]}
            prompt = body["messages"][0]["content"]
            self._times[prompt] += 1
            right = "1 + 1" in prompt or self._times[prompt] % 2
        value = ("2" if "1 + 1" in prompt else "0.5") if right else "7"
        text = f"So it is \\boxed{{{value}}}"
        choice = {"message": {"content": text}, "finish_reason": "stop" if right else "length"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 5}}


@pytest.fixture
def chat() -> Iterator[tuple[Chat, str]]:
    """A server, and its address."""
    behind = Chat()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            behind.keys.append(self.headers.get("Authorization"))
            status, reply = behind.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield behind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
