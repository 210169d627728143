"""`megatron-flowrl plan`: from a recipe to what it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.planning.estimate import Estimate, Setting, estimate
from megatron_flowrl.planning.hardware import Hardware, read_hardware
from megatron_flowrl.planning.meta import real_stages
from megatron_flowrl.planning.parameters import Parameter, total_elements
from megatron_flowrl.planning.refusals import Accepted, Cluster, check_run
from megatron_flowrl.planning.search import Better, better_layouts
from megatron_flowrl.planning.workload import assumed


@dataclass(frozen=True)
class Options:
    """What a plan is asked beside the recipe; None: as `Cluster` and `assumed` have it."""

    gpu: str = "H100"
    gpus: int | None = None
    gpus_per_node: int = 8
    sampler_nodes: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    hardware: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe's needs, and what would be better. Hours and dollars are NaN where a step's seconds are not known."""

    config: Config
    options: Options
    hardware: Hardware
    accepted: Accepted
    setting: Setting
    parameters: int
    log_z_parameters: int
    estimate: Estimate
    better: tuple[Better, ...]

    @property
    def gpus(self) -> int:
        """All of them: those that train, and those that only sample."""
        return self.setting.sizes.nodes * self.setting.sizes.per_node

    @property
    def cost(self) -> float:
        """Dollars of a run."""
        return self.gpus * self.setting.gpu.price * self.hours

    @property
    def hours(self) -> float:
        """Of a run of run.steps, and of its evaluations as far as they are known."""
        return (self.config.run.steps * self.estimate.step + self.evaluations * self.estimate.evaluation) / 3600

    @property
    def evaluations(self) -> int:
        """How many there are in a run: before the first step, every evaluation.interval steps, after the last."""
        if not _evaluates(self.config):
            return 0
        return 1 + -(-self.config.run.steps // self.config.evaluation.interval)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out or has yet to be given, for people."""
        if not _evaluates(self.config) or self.setting.held_out is not None:
            return self.accepted.notes
        return (
            *self.accepted.notes,
            f"evaluation.path = {self.config.evaluation.path} is no JSONL file here: evaluations are left out of hours "
            "and dollars",
        )


def make_plan(config: Config, options: Options) -> Plan:
    """Raises UserError for what a run would refuse, with every problem found."""
    hardware = read_hardware(options.hardware)
    gpu, workload = hardware.gpu(options.gpu), assumed(config, options.prompt_tokens, options.response_tokens)
    cluster = Cluster(options.gpus, options.gpus_per_node, options.sampler_nodes)
    accepted = check_run(config, cluster, workload, gpu)
    architecture, needs, sizes = accepted.shapes.architecture, accepted.needs, accepted.sizes
    setting = Setting(architecture, needs, hardware, gpu, sizes, workload, held_out_prompts(config))
    stages = real_stages(architecture, config, sizes.training * sizes.per_node, log_z=needs.log_z)
    result = estimate(config, setting, stages)
    heads = (p for chunk in stages[-1] for p in chunk if _is_head(p))
    return Plan(
        config,
        options,
        hardware,
        accepted,
        setting,
        total_elements(architecture),
        sum(p.elements for p in heads),
        result,
        tuple(better_layouts(config, setting, result)) if result.sampler_fits else (),
    )


def held_out_prompts(config: Config) -> int | None:
    """Prompts of an evaluation: the lines of evaluation.path, where that is a JSONL file here. Else None."""
    settings = config.evaluation
    path = Path(settings.path or "")
    if not _evaluates(config) or path.suffix != ".jsonl" or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            lines = sum(bool(line.strip()) for line in file)
    except OSError as error:
        raise UserError(f"evaluation.path = {settings.path!r} cannot be read: {error.strerror}") from error
    return lines if settings.limit is None else min(lines, settings.limit)


def _evaluates(config: Config) -> bool:
    return config.evaluation.path is not None and config.rollout.replay is None


def _is_head(parameter: Parameter) -> bool:
    return parameter.name.startswith("log_z.")


__all__ = ["Options", "Plan", "make_plan"]
