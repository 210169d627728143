"""`megatron-flowrl serve`: vLLM servers as a program of their own, such as a SLURM step."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.config import Config, UserError
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rollout.server import VllmServer

_LOOK_SECONDS = 0.5
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def make_servers(config: Config, logs: Path) -> list[VllmServer]:
    """The servers that `config.rollout` asks for, not started yet. Raises UserError for a model they cannot serve."""
    rollout = config.rollout
    folder = locate_model(config.model.path)
    if folder.checkpoint is not None:
        raise UserError(
            f"{config.model.path!r} is a checkpoint of this program; vLLM serves Hugging Face folders: "
            "megatron-flowrl convert megatron-to-hf makes one"
        )
    architecture = read_architecture(folder.hugging_face)
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
    return [
        VllmServer(
            rollout,
            folder.hugging_face,
            logs / f"server_{index}.log",
            port=None if rollout.first_port is None else rollout.first_port + index,
        )
        for index in range(rollout.servers)
    ]


def serve(servers: Sequence[VllmServer]) -> None:
    """Start the servers, print {"urls": [...]} when all are ready, and keep them until a signal to stop.

    Raises ServerError, after ending the others, where one does not start or ends by itself.
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
            while not stop.wait(_LOOK_SECONDS):
                for server in servers:
                    if not server.is_running():
                        raise server.failure("ended by itself")
            logger.info("stopping")
            for server in servers:
                server.ask_to_stop()  # all at once; leaving waits for each
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
