"""`megatron-flowrl plan`: from a recipe to what it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_flowrl.config import Config
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
    """A recipe's needs, and what would be better."""

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
        """Of a run of run.steps."""
        return self.config.run.steps * self.estimate.step / 3600


def make_plan(config: Config, options: Options) -> Plan:
    """Raises UserError for what a run would refuse, with every problem found."""
    hardware = read_hardware(options.hardware)
    gpu, workload = hardware.gpu(options.gpu), assumed(config, options.prompt_tokens, options.response_tokens)
    cluster = Cluster(options.gpus, options.gpus_per_node, options.sampler_nodes)
    accepted = check_run(config, cluster, gpu, workload)
    architecture, needs, sizes = accepted.shapes.architecture, accepted.needs, accepted.sizes
    setting = Setting(architecture, needs, hardware, gpu, sizes, workload)
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
        tuple(better_layouts(config, setting, result)),
    )


def _is_head(parameter: Parameter) -> bool:
    return parameter.name.startswith("log_z.")


__all__ = ["Options", "Plan", "make_plan"]
