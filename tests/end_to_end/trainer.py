"""A trainer for tests: its weights are those of one Hugging Face folder or another, which stands for training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import SafetensorsSource
from megatron_flowrl.config import check_config, load_config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import process_groups, read_world
from megatron_flowrl.rollout.generation import Answer, Sampling
from megatron_flowrl.rollout.sampler import Sampler

COUNT = 24
GREEDY = Sampling(max_tokens=COUNT, temperature=0.0)


class Trainer:
    """A model under a layout, and the servers that sample for it."""

    def __init__(self, model: ParallelModel, sampler: Sampler, rank: int) -> None:
        self.model, self.sampler, self.rank = model, sampler, rank

    def load(self, folder: Path) -> None:
        """Take the weights of a Hugging Face folder."""
        load_weights(self.model, SafetensorsSource(folder, self.model.architecture))

    def greedy(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The most likely answers, asked for one at a time, so that no batch changes the arithmetic."""
        found: list[list[int]] = []
        for prompt in prompts:
            found += [list(answer.token_ids) for answer in self.answers([prompt])]
        return found

    def answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY, n: int = 1) -> list[Answer]:
        """See Sampler.generate."""
        return self.sampler.generate(prompts, sampling, n)


@contextmanager
def trainer(model: Path, logs: Path, settings: dict[str, Any]) -> Iterator[Trainer]:
    """This rank of a trainer with the architecture of `model` and random weights; its servers are ready."""
    world = read_world()
    given = {
        "model.path": str(model),
        "precision.dtype": "float32",
        "rollout.dtype": "float32",
        "logging.level": "info",
        **settings,
    }
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    check_config(config)
    configure_logging(config.logging, world.rank)
    platform = current_platform(world.local_rank)
    with process_groups(world, config.parallel, platform, config.seed):
        # The partition function has to be left out of what is sent.
        parallel_model = build_parallel_model(read_architecture(model), config, platform, log_z=True)
        with Sampler(config, world, parallel_model, model, logs) as sampler:
            sampler.start()
            yield Trainer(parallel_model, sampler, world.rank)
