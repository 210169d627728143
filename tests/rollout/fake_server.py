"""Stands where vLLM stands, for tests of what is around it: python fake_server.py PORT MODE FOLDER.

It starts a child of its own, holds a file in /dev/shm, and answers /health and /get_world_size. FOLDER/processes gets
the process ids, FOLDER/shared the name of the file, FOLDER/temporary that of a temporary one,
FOLDER/environment the environment.
MODE: normal; dies (after a message); silent (never answers); stubborn (ignores SIGTERM, and so does its child);
crashes (kills itself without tidying up, when asked for /crash); stuck (its metrics have work, and no token more);
idle (they have no work).
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

REPLIES = {"/health": b"", "/get_world_size": b'{"world_size": 1}', "/odd": b"<html>"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/crash":
            os.kill(os.getpid(), signal.SIGKILL)
        running = {"stuck": 2, "idle": 0}.get(sys.argv[2])
        if self.path == "/metrics" and running is not None:
            body = b'vllm:num_requests_running{engine="0"} %d\nvllm:generation_tokens_total{engine="0"} 7.0\n' % running
        else:
            body = REPLIES.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.end_headers()
        self.wfile.write(body or b"")


def main() -> None:
    port, mode, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    print("fake server starts", flush=True)
    if mode == "dies":
        print("ValueError: no such model", flush=True)
        sys.exit(3)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "1000"])  # inherits what is ignored
    shared = f"/dev/shm/fake_server_{os.getpid()}"
    with open(shared, "w+b") as file:
        file.write(b"x" * 4096)
        file.flush()
        memory = mmap.mmap(file.fileno(), 4096)
    (folder / "shared").write_text(shared)
    with tempfile.NamedTemporaryFile(delete=False) as left:
        (folder / "temporary").write_text(left.name)
    (folder / "environment").write_text(json.dumps(dict(os.environ)))
    (folder / "processes").write_text(json.dumps([os.getpid(), child.pid]))
    if mode == "silent":
        time.sleep(1000)
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    memory.close()


if __name__ == "__main__":
    main()
