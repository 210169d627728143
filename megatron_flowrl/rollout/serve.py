"""`megatron-flowrl serve`: vLLM servers as a program of their own, such as a SLURM step."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.config import Config, UserError
from megatron_flowrl.model.architecture import Architecture, read_architecture
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rollout.errors import ServerError
from megatron_flowrl.rollout.server import VllmServer, resources, visible_gpus

_LOOK_SECONDS = 0.5
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


def serve(servers: Sequence[VllmServer], max_restarts: int) -> None:
    """Start the servers, print {"urls": [...]} when all are ready, and keep them until a signal to stop.

    One that ends by itself is started again at its address, `max_restarts` times. Raises ServerError, after ending the
    others, where one does not start, or has used that up.
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
            while not stop.wait(_LOOK_SECONDS):
                for server in servers:
                    if not server.is_running():
                        _start_again(server, left, stop)
            logger.info("stopping")
            for server in servers:
                server.ask_to_stop()  # all at once; leaving waits for each
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_again(server: VllmServer, left: dict[str, int], stop: threading.Event) -> None:
    if not left[server.url]:
        raise server.failure("ended by itself")
    left[server.url] -= 1
    logger.warning("%s ended by itself and is started again%s", server.url, server.last_words())
    server.stop()
    try:
        server.start_again(same_port=True)
        server.wait_until_ready(stop)
    except ServerError as error:
        logger.warning("%s", error)
