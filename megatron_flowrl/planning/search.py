"""Better layouts: sizes, micro-batches and recomputation for the same GPUs, by the predicted time of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from megatron_flowrl.config import (
    Config,
    ParallelConfig,
    RecomputeConfig,
    UserError,
    check_answers,
    check_config,
    sizes_of,
)
from megatron_flowrl.data.packing import SequenceTooLong
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.layout import check_layout
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.planning.estimate import Estimate, Setting, estimate
from megatron_flowrl.platform import check_gpu

_SHOWN = 3
_MARGIN = 0.05  # a layout is better from so much less time on
_RECOMPUTE = (
    RecomputeConfig(),
    RecomputeConfig(recompute_granularity="selective"),
    RecomputeConfig(recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
    RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
)


@dataclass(frozen=True)
class Better:
    """A layout, as settings that differ from the recipe's, and what is expected of it."""

    overrides: tuple[str, ...]
    estimate: Estimate


def better_layouts(config: Config, setting: Setting, given: Estimate) -> list[Better]:
    """The best few that fit, fastest first; none unless the best is clearly better, or the given one does not fit."""
    found = []
    for candidate in _candidates(config, setting):
        try:
            result = estimate(candidate, setting)
        except SequenceTooLong:
            continue
        if not result.problems:
            found.append((result.step, candidate, result))
    # Of those that differ in micro-batches and recomputation alone, the fastest: the others would say nothing new.
    fastest: dict[ParallelConfig, tuple[float, Config, Estimate]] = {}
    for one in found:
        if one[0] < fastest.get(one[1].parallel, (float("inf"),))[0]:
            fastest[one[1].parallel] = one
    found = sorted(fastest.values(), key=lambda one: one[0])
    if not found or (not given.problems and found[0][0] > (1 - _MARGIN) * given.step):
        return []
    limit = given.step if not given.problems else float("inf")
    return [Better(_overrides(config, one), result) for step, one, result in found[:_SHOWN] if step < limit]


def _candidates(config: Config, setting: Setting) -> Iterator[Config]:
    """Layouts that a run would not refuse."""
    world = setting.sizes.training * setting.sizes.per_node
    tokens = _token_budgets(config, setting)
    for parallel in _parallel(config, setting.architecture, world, setting.sizes.per_node):
        for budget, recompute in product(tokens, _RECOMPUTE):
            candidate = replace(
                config, parallel=parallel, recompute=recompute, data=replace(config.data, tokens_per_micro_batch=budget)
            )
            if _is_accepted(candidate, setting, world):
                yield candidate


def _parallel(config: Config, architecture: Architecture, world: int, per_node: int) -> Iterator[ParallelConfig]:
    powers = [2**i for i in range(8)]
    for tp, pp, cp in product([p for p in powers if p <= per_node], powers[:6], powers[:5]):
        if world % (tp * pp * cp) or pp > architecture.num_layers:
            continue
        for vpp in (None, 2, 4) if pp > 1 else (None,):
            yield replace(
                config.parallel,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp,
                context_parallel_size=cp,
                sequence_parallel=tp > 1,
                num_layers_in_first_pipeline_stage=None,
                num_layers_in_last_pipeline_stage=None,
            )


def _token_budgets(config: Config, setting: Setting) -> list[int]:
    """The recipe's, its half and double, and the least that holds the longest answer; such a one in whole 1,024s."""
    given = config.data.tokens_per_micro_batch
    longest = setting.workload.prompt_tokens + config.generation.max_tokens
    longest = max(longest, min(given, config.prompts.max_tokens + config.generation.max_tokens))
    least = -(-longest // 1024) * 1024
    return sorted({given, least, *(one for one in (given // 2, given * 2) if one >= longest)})


def _is_accepted(config: Config, setting: Setting, world: int) -> bool:
    """By the checks that depend on what is varied."""
    sizes, parallel = setting.sizes, config.parallel
    replicas = world // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )  # fmt: skip
    try:
        check_config(config)
        check_answers(config)
        check_gpu(config, lambda: setting.gpu.capability)
        check_layout(setting.architecture, config)
        sizes_of(config, sizes.per_node, sizes.training, sizes.serving)
        plan(
            [setting.workload.prompt_tokens + config.generation.max_tokens],
            packing_rules(config, setting.architecture, replicas),
        )
    except UserError:
        return False
    return True


def _overrides(given: Config, better: Config) -> tuple[str, ...]:
    """Settings of `better` that are others than those of `given`, as a command line has them."""
    found = []
    for section in ("parallel", "recompute", "data"):
        before, after = getattr(given, section), getattr(better, section)
        for field in fields(before):
            value = getattr(after, field.name)
            if value != getattr(before, field.name):
                found.append(f"{section}.{field.name}={_written(value)}")
    return tuple(found)


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


__all__ = ["Better", "better_layouts"]
