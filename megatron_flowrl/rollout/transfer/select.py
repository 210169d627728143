"""The way for the weights that the configuration asks for."""

from __future__ import annotations

from pathlib import Path

from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.config import Config
from megatron_flowrl.rollout.transfer.base import WeightTransfer
from megatron_flowrl.rollout.transfer.disk import DiskTransfer
from megatron_flowrl.rollout.transfer.gloo import GlooTransfer
from megatron_flowrl.rollout.transfer.shm import ShmTransfer


def make_transfer(backend: str, config: Config, stream: WeightStream, companions: Path) -> WeightTransfer:
    """This rank's end of `backend`. All ranks call it together; raises SharedUserError where it cannot be had."""
    match backend:
        case "shm":
            return ShmTransfer(stream)
        case "gloo":
            return GlooTransfer(stream, timeout=config.rollout.transfer_timeout_seconds)
        case "disk":
            return DiskTransfer(stream, companions, config.rollout.transfer_folder)
        case _:
            from megatron_flowrl.rollout.transfer.vllm_engines import VllmEngineTransfer  # imports vLLM

            return VllmEngineTransfer(stream, backend, timeout=config.rollout.transfer_timeout_seconds)
