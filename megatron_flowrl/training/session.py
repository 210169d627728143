"""What every command that computes has in common: settings checked, the model found, process groups joined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_flowrl.checkpoint.locate import ModelFolder, locate_model
from megatron_flowrl.config import Config, check_config, data_parallel_size
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform import Platform, check_platform, current_platform
from megatron_flowrl.platform.distributed import World, alike, process_groups


@dataclass(frozen=True)
class Session:
    """A command's settings, checked and with the model's path resolved, and where it runs."""

    config: Config
    world: World
    folder: ModelFolder
    replicas: int  # the data-parallel size
    platform: Platform

    @property
    def tokenizer(self) -> str | Path:
        """The folder of the tokenizer, for text."""
        return self.config.data.tokenizer or self.folder.hugging_face

    def layout(self) -> str:
        """The ranks and how they share the work, for people."""
        p = self.config.parallel
        chunks = f" (VPP{p.virtual_pipeline_model_parallel_size})" if p.virtual_pipeline_model_parallel_size else ""
        sequence = " (SP)" if p.sequence_parallel else ""
        return (
            f"{self.world.size} rank{'s' * (self.world.size > 1)} = TP{p.tensor_model_parallel_size}{sequence} x "
            f"PP{p.pipeline_model_parallel_size}{chunks} x CP{p.context_parallel_size} x DP{self.replicas}"
        )


@contextmanager
def prepared(config: Config, world: World) -> Iterator[Session]:
    """Check the settings, find the model, and be in the process groups for the block. Raises SharedUserError."""
    with alike():
        check_config(config)
        folder = locate_model(config.model.path)  # once: a run that goes on may save meanwhile
        config = replace(config, model=replace(config.model, path=str(folder.checkpoint or config.model.path)))
        replicas = data_parallel_size(config.parallel, world.size)
    platform = current_platform(world.local_rank)
    check_platform(config, platform)
    logger.info(platform.describe(config.precision.fp8))
    with process_groups(world, config.parallel, platform, config.seed):
        yield Session(config, world, folder, replicas, platform)


__all__ = ["Session", "prepared"]
