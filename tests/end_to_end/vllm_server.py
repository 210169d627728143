"""A vLLM server on the loopback for tests: started, asked, and ended with everything it has started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

START_SECONDS = 180.0


class VllmServer:
    """Answers of the model that is served."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely next tokens, one after the other."""
        body = {
            "prompt": list(prompt), "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "detokenize": False,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            tokens: list[int] = json.load(reply)["choices"][0]["token_ids"]
        return tokens


@contextlib.contextmanager
def serve(model: Path, log: Path) -> Iterator[VllmServer]:
    """Serve the Hugging Face folder `model`, which needs no tokenizer, in fp32."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256",
        "--skip-tokenizer-init", "--generation-config", "vllm", "--enforce-eager",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = VllmServer(port)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.is_ready():
            assert process.poll() is None, f"the server ended:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"not ready in {START_SECONDS} s:\n{log.read_text()[-4000:]}"
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()  # it tidies up /dev/shm
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
