"""`megatron-flowrl serve`: vLLM servers as a program of their own, such as a SLURM step."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.config import Config, UserError
from megatron_flowrl.model.architecture import Architecture, read_architecture
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rollout.errors import ServerError
from megatron_flowrl.rollout.health import Standstill, tokens_under_way
from megatron_flowrl.rollout.server import VllmServer, resources, visible_gpus

_LOOK_SECONDS = 0.5
_LOOK_AT_METRICS_SECONDS = 5.0
_SEEDS_A_SERVER = 1000  # one for each time it is started
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def transfer_backend(config: Config, gpus: int | None = None) -> str:
    """What `rollout.transfer` says, or stands for where there are so many GPUs (None: on this machine).

    Raises UserError for one that cannot work there.
    """
    rollout = config.rollout
    gpus = visible_gpus() if gpus is None else gpus
    if rollout.transfer is None:
        return "shm" if not gpus else "ipc" if rollout.colocated else "nccl"
    if gpus and rollout.transfer in ("shm", "gloo"):
        raise UserError(
            f"rollout.transfer = {rollout.transfer} moves weights between CPUs, and this machine has GPUs; set "
            "rollout.transfer=nccl, ipc or disk, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    if not gpus and rollout.transfer in ("nccl", "ipc"):
        raise UserError(
            f"rollout.transfer = {rollout.transfer} needs GPUs, and this machine shows none; set rollout.transfer=shm, "
            "gloo or disk"
        )
    return rollout.transfer


def make_servers(config: Config, model: Path, logs: Path, *, random_weights: bool = False) -> list[VllmServer]:
    """The servers that `config.rollout` asks for, for a Hugging Face folder; not started yet.

    `random_weights` is for servers that get theirs before they are asked anything: the folder may then have none.

    Raises UserError for a model they cannot serve, or what this machine does not have.
    """
    rollout = config.rollout
    check_servers(config, read_architecture(model))
    if rollout.quantization is not None and not visible_gpus():
        raise UserError(
            f"rollout.quantization = {rollout.quantization} needs GPUs, and this machine shows none; set "
            "rollout.quantization=null"
        )
    transfer = transfer_backend(config)
    return [
        VllmServer(
            rollout,
            model,
            logs / f"server_{index}.log",
            port=None if rollout.first_port is None else rollout.first_port + index,
            seed=config.seed + index * _SEEDS_A_SERVER,
            transfer=transfer,
            random_weights=random_weights,
            resources=share,
        )
        for index, share in enumerate(resources(rollout, os.environ, visible_gpus()))
    ]


def check_servers(config: Config, architecture: Architecture) -> None:
    """Raises UserError for a model that the servers of `config.rollout` cannot serve as they are told to."""
    rollout = config.rollout
    if architecture.num_attention_heads % rollout.tensor_parallel_size:
        raise UserError(
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size} does not divide the model's "
            f"num_attention_heads = {architecture.num_attention_heads}"
        )
    wanted = rollout.max_model_len
    if wanted is not None and wanted > architecture.max_sequence_length:
        raise UserError(
            f"rollout.max_model_len = {wanted} is above the model's limit of {architecture.max_sequence_length} tokens"
        )


def servable(path: str) -> Path:
    """The Hugging Face folder at `path`. Raises UserError for a checkpoint, which vLLM does not read."""
    folder = locate_model(path)
    if folder.checkpoint is not None:
        raise UserError(
            f"{path!r} is a checkpoint of this program; vLLM serves Hugging Face folders: "
            "megatron-flowrl convert megatron-to-hf makes one"
        )
    return folder.hugging_face


class _Watch:
    """Of one server: why it is to be started again, if it is. `hang_seconds` 0: only where it has ended."""

    def __init__(self, server: VllmServer, hang_seconds: float) -> None:
        self._server, self._hang_seconds = server, hang_seconds
        self.begin()

    def begin(self) -> None:
        """It was started, and is ready."""
        self._standstill = Standstill(self._hang_seconds, self._server.settings.start_timeout_seconds)
        self._looked = self._answered = time.monotonic()

    def trouble(self) -> str | None:
        """After a word like its address."""
        if not self._server.is_running():
            return "ended by itself"
        if not self._hang_seconds or time.monotonic() - self._looked < _LOOK_AT_METRICS_SECONDS:
            return None
        tokens = None
        with suppress(OSError):
            tokens = tokens_under_way(self._server.text("/metrics", _LOOK_AT_METRICS_SECONDS))
            self._answered = time.monotonic()
        self._looked = time.monotonic()
        if self._looked - self._answered > self._hang_seconds or self._standstill.seen(tokens, self._looked):
            return f"has made no token in {self._hang_seconds:.0f} s though it was asked to (rollout.hang_seconds)"
        return None


def serve(servers: Sequence[VllmServer], max_restarts: int, hang_seconds: float) -> None:
    """Start the servers, print {"urls": [...]} when all are ready, and keep them until a signal to stop.

    One that ends by itself, or does nothing for `hang_seconds` of what it was asked, is started again at its address,
    `max_restarts` times. Raises ServerError, after ending the others, where one does not start, or has used that up.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS}
    try:
        with ExitStack() as stack:
            for server in servers:
                stack.enter_context(server)
                logger.info("starting %s, log %s", server.url, server.log)
            for server in servers:
                server.wait_until_ready(stop)
            if not stop.is_set():
                logger.info("all servers are ready")
                print(json.dumps({"urls": [server.url for server in servers]}), flush=True)
            left = {server.url: max_restarts for server in servers}
            watches = {server.url: _Watch(server, hang_seconds) for server in servers}
            while not stop.wait(_LOOK_SECONDS):
                for server in servers:
                    trouble = watches[server.url].trouble()
                    if trouble is not None:
                        _start_again(server, trouble, left, stop)
                        watches[server.url].begin()
            logger.info("stopping")
            for server in servers:
                server.ask_to_stop()  # all at once; leaving waits for each
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_again(server: VllmServer, trouble: str, left: dict[str, int], stop: threading.Event) -> None:
    if not left[server.url]:
        raise server.failure(trouble)
    left[server.url] -= 1
    logger.warning("%s %s and is started again%s", server.url, trouble, server.last_words())
    server.stop()
    try:
        server.start_again(same_port=True)
        server.wait_until_ready(stop)
    except ServerError as error:
        logger.warning("%s", error)
