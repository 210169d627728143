"""The packing of a step at its true size: the lengths of a plan, the recipe's token budget, its data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flowrl.config import Config
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.planning.compute import bubble
from megatron_flowrl.planning.hardware import read_hardware
from megatron_flowrl.planning.workload import Workload, response_lengths
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
        waiting = bubble(self.stages, self.chunks, sum(counts) / len(counts))
        return waiting / (1 + waiting)


def pack_step(config: Config, architecture: Architecture, replicas: int, workload: Workload) -> PackedStep:
    """Plan a step whose updates all have answers of the foreseen lengths. Raises UserError where one does not fit."""
    answers, run, parallel = config.generation.n, config.run, config.parallel
    update = response_lengths(
        run.prompts_per_mini_batch * answers,
        workload.response_tokens,
        config.generation.max_tokens,
        read_hardware().sampler.length_sigma,
    )
    updates = run.prompts_per_step // run.prompts_per_mini_batch
    lengths = [workload.prompt_tokens + answer for answer in update * updates]
    groups = [place // answers for place in range(len(lengths))]
    rules = packing_rules(config, architecture, replicas)
    packing = plan(lengths, rules, mini_batches(groups, run.prompts_per_mini_batch))
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return PackedStep(packing, parallel.pipeline_model_parallel_size, chunks)


__all__ = ["PackedStep", "pack_step"]
