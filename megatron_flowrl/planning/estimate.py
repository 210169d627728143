"""A layout's memory and time: what the plan of a recipe and the search for a better one have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_flowrl.config import Config, Sizes
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.objective import needs_old_pass
from megatron_flowrl.model.packing_rules import packing_rules
from megatron_flowrl.objectives.batch import Needs
from megatron_flowrl.planning.activations import MicroBatch, stage_activations
from megatron_flowrl.planning.compute import Machine, optimizer_time, pass_time
from megatron_flowrl.planning.hardware import Gpu, Hardware
from megatron_flowrl.planning.memory import RankMemory, SamplerMemory, rank_memory, sampler_memory, transfer_bytes
from megatron_flowrl.planning.parameters import Stage, counted_stages, total_elements
from megatron_flowrl.planning.sampling import Sampling, sampling
from megatron_flowrl.planning.workload import RankLoad, Workload, mini_batch_load, response_lengths


@dataclass(frozen=True)
class Setting:
    """What stays the same while layouts are compared; held_out: prompts of an evaluation, None: not known."""

    architecture: Architecture
    needs: Needs
    hardware: Hardware
    gpu: Gpu
    sizes: Sizes
    workload: Workload
    held_out: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Of a layout. `seconds`: of a step, by phase; `problems`: why it does not fit the GPU, nothing where it does.

    evaluation: seconds of one. NaN where a time is not known: the sampler has no room for keys and values.
    """

    stages: tuple[RankMemory, ...]
    sampler: SamplerMemory | None
    sampling: Sampling | None
    seconds: dict[str, float]
    bubble: float
    communication: float
    micro_batches: int
    problems: tuple[str, ...]
    evaluation: float = 0.0
    sampler_fits: bool = True

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def fullest(self) -> RankMemory:
        """The rank with the most memory."""
        return max(self.stages, key=lambda stage: stage.total)


def estimate(config: Config, setting: Setting, stages: Sequence[Stage] | None = None) -> Estimate:
    """`stages`: the real model's parameters; without them they are counted.

    Raises SequenceTooLong where an answer does not fit into a micro-batch; the settings have been checked otherwise.
    """
    needs, architecture, sizes = setting.needs, setting.architecture, setting.sizes
    parallel, run, workload = config.parallel, config.run, setting.workload
    world = sizes.training * sizes.per_node
    replicas = world // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )  # fmt: skip
    machine = Machine(setting.hardware, setting.gpu, sizes.per_node, replicas)
    stages = counted_stages(architecture, config, log_z=needs.log_z) if stages is None else stages
    critics = counted_stages(architecture, config, value_head=True) if needs.values else [None] * len(stages)
    rules = packing_rules(config, architecture, replicas)
    lengths = _lengths(config, setting, run.prompts_per_mini_batch * config.generation.n)
    load = mini_batch_load(lengths, workload.prompt_tokens, rules)
    full = _full_micro_batch(rules.longest_sequence, workload)
    ranks = replicas * parallel.context_parallel_size
    servers = num_servers(config, sizes)
    shared = config.rollout.colocated and servers > 0
    transfer = transfer_bytes(architecture, config, setting.hardware) if shared else 0.0
    memory = tuple(
        rank_memory(
            stage,
            stage_activations(
                architecture, config, index, full, load.micro_batches, "transformer_engine", log_z=needs.log_z
            ),
            config,
            setting.hardware,
            ranks,
            reference=needs.reference,
            critic=critic,
            transfer=transfer,
        )
        for index, (stage, critic) in enumerate(zip(stages, critics, strict=True))
    )
    sampler = sampled = None
    rollout, evaluation = 0.0, 0.0
    if servers:
        sampler = sampler_memory(architecture, config, setting.hardware, setting.gpu.memory)
        sampled = _sampled(config, setting, machine, sampler, run.prompts_per_step)
        rollout = math.nan if sampled is None else sampled.seconds
        if setting.held_out:
            evaluated = _sampled(_evaluated(config), setting, machine, sampler, setting.held_out)
            evaluation = math.nan if evaluated is None else evaluated.seconds
    seconds, bubble, communication = _seconds(config, setting, machine, stages, load, rollout, memory)
    return Estimate(
        memory,
        sampler,
        sampled,
        seconds,
        bubble,
        communication,
        load.micro_batches,
        tuple(_problems(config, setting, memory, sampler)),
        evaluation,
        sampler is None or sampler.kv_tokens >= _longest(config, setting),
    )


def _sampled(
    config: Config, setting: Setting, machine: Machine, sampler: SamplerMemory, prompts: int
) -> Sampling | None:
    """Of one of the servers that answer so many prompts; None where they have no room for keys and values."""
    if not sampler.kv_tokens:
        return None
    lengths = _lengths(config, setting, max(1, prompts * config.generation.n // num_servers(config, setting.sizes)))
    return sampling(setting.architecture, config, machine, sampler, lengths, setting.workload.prompt_tokens)


def _evaluated(config: Config) -> Config:
    """With the numbers that are of evaluations in the place of those of training."""
    own = config.evaluation
    longest = own.max_tokens or config.generation.max_tokens
    return replace(config, generation=replace(config.generation, n=own.n, max_tokens=longest))


def num_servers(config: Config, sizes: Sizes) -> int:
    """vLLM servers of the whole run: on each node, where they share those that train; 0: answers are replayed."""
    if config.rollout.replay is not None:
        return 0
    if config.generation.urls:
        return len(config.generation.urls)
    return config.rollout.servers * (sizes.training if config.rollout.colocated else max(1, sizes.serving))


def _lengths(config: Config, setting: Setting, count: int) -> tuple[int, ...]:
    sigma, longest = setting.hardware.sampler.length_sigma, config.generation.max_tokens
    return response_lengths(count, min(setting.workload.response_tokens, longest), longest, sigma)


def _longest(config: Config, setting: Setting) -> int:
    return setting.workload.prompt_tokens + config.generation.max_tokens


def _full_micro_batch(tokens: int, workload: Workload) -> MicroBatch:
    """The fullest that a run may meet, of sequences of mean length."""
    length = workload.prompt_tokens + workload.response_tokens
    sequences = max(1, tokens // length)
    return MicroBatch(tokens, tokens * workload.response_tokens // length, sequences, float(tokens) * length)


def _seconds(
    config: Config,
    setting: Setting,
    machine: Machine,
    stages: Sequence[Stage],
    load: RankLoad,
    rollout: float,
    memory: Sequence[RankMemory],
) -> tuple[dict[str, float], float, float]:
    """Of a step by phase; the bubble's share of an update, and that of tensor-parallel communication."""
    needs, architecture, costs = setting.needs, setting.architecture, setting.hardware.transfer
    updates = config.run.prompts_per_step // config.run.prompts_per_mini_batch
    forward = pass_time(architecture, config, machine, load, training=False).seconds * updates
    training = pass_time(architecture, config, machine, load, training=True)
    valued = {
        both: pass_time(architecture, config, machine, load, training=both, output=False) for both in (False, True)
    }
    gradients, states = (
        max(times) for times in zip(*(optimizer_time(config, machine, s) for s in stages), strict=True)
    )
    seconds = {"rollout": rollout}
    if needs_old_pass(needs, updates, config):
        seconds["old_log_probs"] = forward
    if needs.reference:
        exchanged = 4 * memory[0].host / costs.host  # two exchanges, each of them both ways
        seconds["reference_log_probs"] = forward + exchanged
    if needs.values:
        seconds["values"] = updates * valued[False].seconds
    update = updates * (training.seconds + gradients)
    seconds["update"] = update
    if needs.values:
        seconds["critic"] = updates * (valued[True].seconds + gradients + states)
    seconds["optimizer"] = updates * states
    itemsize = 2 if config.rollout.dtype == "bfloat16" else 4
    if num_servers(config, setting.sizes):
        seconds["weight_sync"] = total_elements(architecture) * itemsize / costs.weights
    seconds["checkpoint"] = _checkpoint(config, machine, memory, setting) / config.checkpoint.save_interval
    seconds["other"] = costs.step_seconds
    return seconds, training.bubble / training.seconds, training.communication / training.seconds


def _checkpoint(config: Config, machine: Machine, memory: Sequence[RankMemory], setting: Setting) -> float:
    """Seconds that training stands still for: the copy to the host, or without async_save the writing too."""
    costs = setting.hardware.transfer
    states = max(rank.kinds["weights"] / machine.replicas + rank.kinds["optimizer"] for rank in memory)
    copied = states / costs.host
    if config.checkpoint.async_save:
        return copied
    return copied + states * setting.sizes.per_node / costs.disk


def _problems(
    config: Config, setting: Setting, memory: Sequence[RankMemory], sampler: SamplerMemory | None
) -> list[str]:
    room, found = setting.gpu.memory, []
    shared = config.rollout.colocated and sampler is not None
    sleeping = setting.hardware.sampler.sleeping if shared else 0.0
    needed = max(rank.total for rank in memory) + sleeping
    if needed > room:
        found.append(f"training takes {needed / 1e9:.1f} GB of the GPU's {room / 1e9:.1f} GB")
    if sampler is None:
        return found
    resident = max(rank.resident for rank in memory) if shared else 0.0
    least = sampler.weights + sampler.working + _longest(config, setting) * sampler.kv_bytes_per_token
    share = math.floor(max(0.0, room - resident) / room * 100) / 100
    if sampler.kv_tokens < _longest(config, setting):
        cure = "raise rollout.tensor_parallel_size"
        if least <= share * room:
            cure += f", or vLLM's --gpu-memory-utilization (rollout.extra_arguments) to {least / room + 0.005:.2f}"
        found.append(
            f"a server has room for the keys and values of {sampler.kv_tokens} tokens, and an answer may have "
            f"{_longest(config, setting)}: of the {sampler.limit / 1e9:.1f} GB that vLLM may have, weights take "
            f"{sampler.weights / 1e9:.1f} and working memory {sampler.working / 1e9:.1f}; {cure}"
        )
    if shared and resident + sampler.limit > room:
        cure = f"set rollout.extra_arguments=[--gpu-memory-utilization={share:.2f}] or less"
        if least > share * room:
            cure = (
                "with less it has no room for keys and values: raise parallel.tensor_model_parallel_size or "
                "rollout.tensor_parallel_size"
            )
        found.append(
            f"beside the {resident / 1e9:.1f} GB that training keeps, buffers of weight transfers among them, vLLM "
            f"cannot have {sampler.limit / 1e9:.1f} GB: {cure}"
        )
    return found


__all__ = ["Estimate", "Setting", "estimate", "num_servers"]
