"""The packing of a step at its true size: drawn lengths, the recipe's token budget, its data-parallel ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.training.trainer import mini_batches


@dataclass(frozen=True)
class PackedStep:
    """A step's plan, which `plan_packing` has found to hold its invariants, and what it means for a pipeline."""

    packing: PackingPlan
    stages: int
    chunks: int

    @property
    def idle_share(self) -> float:
        """Of the time of an update, what a stage waits for others to begin and to end (1F1B; equal micro-batches)."""
        counts = [self.packing.num_micro_batches(m) for m in range(len(self.packing.mini_batches))]
        filling = (self.stages - 1) / self.chunks
        return filling / (sum(counts) / len(counts) + filling)


def pack_step(config: Config, architecture: Architecture, replicas: int, seed: int = 0) -> PackedStep:
    """Plan a step of prompts x answers, one of which is as long as can be. Raises UserError where that does not fit."""
    answers, parallel = config.generation.n, config.parallel
    if config.run.prompts_per_mini_batch * answers < replicas:
        raise UserError(
            f"run.prompts_per_mini_batch = {config.run.prompts_per_mini_batch} with generation.n = {answers} answers "
            f"are fewer than the {replicas} data-parallel ranks; take fewer GPUs, or raise one of them"
        )
    rules = packing_rules(config, architecture, replicas)
    plan([config.prompts.max_tokens + config.generation.max_tokens], rules)
    lengths = list(_lengths(config, random.Random(seed)))
    groups = [place // answers for place in range(len(lengths))]
    packing = plan(lengths, rules, mini_batches(groups, config.run.prompts_per_mini_batch))
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return PackedStep(packing, parallel.pipeline_model_parallel_size, chunks)


def _lengths(config: Config, draw: random.Random) -> Iterator[int]:
    """Prompt and answer: as ragged as in training, most of them short, a few cut off at the limit."""
    longest_prompt, longest = config.prompts.max_tokens, config.generation.max_tokens
    for prompt in range(config.run.prompts_per_step):
        tokens = longest_prompt if prompt == 0 else draw.randint(1, max(1, longest_prompt // 4))
        for answer in range(config.generation.n):
            drawn = longest if (prompt, answer) == (0, 0) else int(draw.lognormvariate(0, 1) * longest / 6)
            yield tokens + min(max(drawn, 1), longest)


__all__ = ["PackedStep", "pack_step"]
