"""Everything that a run would refuse, asked of the same functions as `train` asks, without GPUs, data or weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_flowrl.config import (
    Config,
    RewardConfig,
    Sizes,
    UserError,
    check_answers,
    check_config,
    collected,
    data_parallel_size,
    sizes_of,
)
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.layout import check_layout, max_sequence_length
from megatron_flowrl.model.objective import build_objective
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.objectives.batch import Needs
from megatron_flowrl.planning.hardware import Gpu, peak
from megatron_flowrl.planning.shapes import Shapes, find_shapes
from megatron_flowrl.planning.workload import Workload
from megatron_flowrl.platform import check_gpu
from megatron_flowrl.rewards.find import BUILT_IN, check_names, make_grader, terms_of
from megatron_flowrl.rollout.serve import check_servers, transfer_backend
from megatron_flowrl.rollout.server import resources

_ANY_GPU = (1000, 0)  # a compute capability that has everything
_ASK_THE_MACHINE = ("math", "reasoning_gym", "code")  # graders that want a package, or a jail


@dataclass(frozen=True)
class Cluster:
    """GPUs that train, in a node; nodes that serve alone (None: one, where servers have GPUs of their own)."""

    gpus: int | None
    per_node: int = 8
    sampler_nodes: int | None = None

    def sizes(self, config: Config) -> Sizes:
        """As scripts/slurm/submit.py has them. Raises UserError for what does not fit."""
        per_node, nodes = self.per_node, None
        if self.gpus is not None:
            per_node = min(self.per_node, self.gpus)
            nodes, rest = divmod(self.gpus, per_node)
            if rest:
                raise UserError(
                    f"--gpus {self.gpus} are no whole nodes of --gpus-per-node {self.per_node}; give a multiple"
                )
        return sizes_of(config, per_node, nodes, self.serving(config))

    def serving(self, config: Config) -> int:
        """Nodes that serve alone."""
        if self.sampler_nodes is not None:
            return self.sampler_nodes
        own = config.rollout.replay is None and not config.generation.urls and not config.rollout.colocated
        return int(own)


@dataclass(frozen=True)
class Accepted:
    """What is known of a recipe that a run would not refuse; `notes`: what it has yet to be given, for people."""

    shapes: Shapes
    sizes: Sizes
    replicas: int
    needs: Needs
    notes: tuple[str, ...]


def check_run(config: Config, cluster: Cluster, workload: Workload, gpu: Gpu | None = None) -> Accepted:
    """Without `gpu` it may be of any kind. Raises UserError with every problem that can be told."""
    problems: list[str] = []
    with collected(problems):
        check_config(config)
    with collected(problems):
        check_answers(config)
    shapes = sizes = objective = None
    replicas = 1
    with collected(problems):
        shapes = find_shapes(config.model.path)
    with collected(problems):
        sizes = cluster.sizes(config)
        replicas = data_parallel_size(config.parallel, sizes.training * sizes.per_node)
    with collected(problems):
        objective = build_objective(config)
    with collected(problems):
        check_gpu(config, lambda: gpu.capability if gpu is not None else _ANY_GPU)
    if gpu is not None:
        with collected(problems):
            peak(gpu, "fp8" if config.precision.fp8 else config.precision.dtype)
    if shapes is not None:
        problems += _of_model(config, shapes.architecture, sizes, replicas, workload)
    unknown: list[str] = []
    if config.rollout.replay is None:
        with collected(problems):
            unknown += _of_graders(config.reward, problems)
    if problems or shapes is None or sizes is None or objective is None:
        raise UserError(*dict.fromkeys(problems))
    return Accepted(shapes, sizes, replicas, objective.needs, (*_notes(config, shapes, cluster), *unknown))


def _of_model(
    config: Config, architecture: Architecture, sizes: Sizes | None, replicas: int, workload: Workload
) -> list[str]:
    problems: list[str] = []
    with collected(problems):
        check_layout(architecture, config)
    limit, answer = max_sequence_length(architecture, config), config.generation.max_tokens
    if config.rollout.max_model_len is not None:
        limit = min(limit, config.rollout.max_model_len)
    if workload.prompt_tokens + answer > limit:
        problems.append(
            f"generation.max_tokens = {answer} after a prompt of {workload.prompt_tokens} tokens is above {limit}, the "
            "longest sequence (model.max_sequence_length, rollout.max_model_len, or the model's limit): such prompts "
            "are left out; lower it"
        )
    with collected(problems):
        rules = packing_rules(config, architecture, replicas)
        plan([workload.prompt_tokens + answer], rules)
    if config.rollout.replay is None and not config.generation.urls:
        with collected(problems):
            check_servers(config, architecture)
            transfer_backend(config, gpus=sizes.per_node if sizes is not None else 1)
            if sizes is not None:
                resources(config.rollout, {}, sizes.per_node)
    return problems


def _notes(config: Config, shapes: Shapes, cluster: Cluster) -> Iterator[str]:
    if shapes.note is not None:
        yield shapes.note
    missing = [
        key
        for key, value in (("run.folder", config.run.folder), ("prompts.path", config.prompts.path))
        if not value and config.rollout.replay is None
    ]
    if missing:
        yield f"{' and '.join(missing)}: not given; a run needs {'them' if len(missing) > 1 else 'it'}"
    budget = config.data.tokens_per_micro_batch
    longest = min(
        config.prompts.max_tokens + config.generation.max_tokens, max_sequence_length(shapes.architecture, config)
    )
    if longest > budget:
        yield (
            f"data.tokens_per_micro_batch = {budget}: a run refuses prompts longer than "
            f"{budget - config.generation.max_tokens} tokens, and prompts.max_tokens lets {config.prompts.max_tokens} "
            "through; lower that, or raise it"
        )
    if cluster.sampler_nodes is None and cluster.serving(config):
        yield "servers with GPUs of their own: one node of them is taken for granted (--sampler-nodes)"


def _of_graders(settings: RewardConfig, problems: list[str]) -> Iterator[str]:
    """Notes of what this machine lacks, which is not the one that grades; `problems` get what no machine would have."""
    check_names(settings.grader)
    for _, name in terms_of(settings.grader):
        try:
            make_grader(replace(settings, grader=name))
        except UserError as error:
            not_imported = name not in BUILT_IN and error.__cause__ is not None
            if not_imported or name in _ASK_THE_MACHINE:
                yield f"on this machine: {error}"
            else:
                problems += error.problems


__all__ = ["Accepted", "Cluster", "check_run"]
