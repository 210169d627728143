"""A plan as text for people, and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_flowrl.planning.hardware import as_settings
from megatron_flowrl.planning.memory import RankMemory
from megatron_flowrl.planning.plan import Plan

_BAR = 30
_KINDS = {
    "weights": "weights",
    "gradients": "gradients (fp32)",
    "optimizer": "optimizer states",
    "log_z": "log Z, with all of these",
    "reference": "reference",
    "critic": "critic, with all of these",
    "fp8_copies": "FP8 copies of weights",
    "activations": "activations",
    "recomputation": "recomputed at a time",
    "log_prob": "log-prob op",
    "context": "CUDA and NCCL",
    "fragmentation": "lost by the allocator",
}
_PHASES = {
    "rollout": "rollout",
    "old_log_probs": "old log-probs",
    "reference_log_probs": "reference log-probs",
    "values": "critic's values",
    "update": "update",
    "critic": "critic's update",
    "optimizer": "optimizer",
    "weight_sync": "weights to the sampler",
    "checkpoint": "checkpoint, on average",
    "other": "other",
}


def as_text(plan: Plan) -> str:
    """Lines for people; bytes in GB of 1e9."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_time(plan), "", *_verdict(plan), *_better(plan)])


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds, dollars."""
    result, sizes = plan.estimate, plan.setting.sizes
    return {
        "model": plan.config.model.path,
        "parameters": plan.parameters,
        "log_z_parameters": plan.log_z_parameters,
        "gpu": plan.options.gpu,
        "gpus": {"training": sizes.training * sizes.per_node, "sampling_only": sizes.serving * sizes.per_node},
        "data_parallel_size": plan.accepted.replicas,
        "workload": asdict(plan.setting.workload),
        "memory_per_rank": _rank(result.fullest),
        "memory_by_stage": [_rank(stage) for stage in result.stages],
        "gpu_memory": plan.setting.gpu.memory,
        "sampler_memory": asdict(result.sampler) | {"kv_tokens": result.sampler.kv_tokens} if result.sampler else None,
        "fits": not result.problems,
        "problems": list(result.problems),
        "notes": list(plan.accepted.notes),
        "seconds": result.seconds | {"step": result.step},
        "sampling": asdict(result.sampling) if result.sampling else None,
        "update": {
            "micro_batches": result.micro_batches,
            "bubble_share": result.bubble,
            "tensor_parallel_communication_share": result.communication,
        },
        "run": {"steps": plan.config.run.steps, "hours": plan.hours, "dollars": plan.cost},
        "better": [
            {
                "overrides": list(one.overrides),
                "step_seconds": one.estimate.step,
                "memory_per_rank": _rank(one.estimate.fullest),
            }
            for one in plan.better
        ],
        "hardware": as_settings(plan.hardware),
    }


def _rank(memory: RankMemory) -> dict[str, float]:
    return {**memory.kinds, "total": memory.total, "resident": memory.resident, "host": memory.host}


def _head(plan: Plan) -> Iterator[str]:
    parallel, sizes, load = plan.config.parallel, plan.setting.sizes, plan.setting.workload
    chunks = parallel.virtual_pipeline_model_parallel_size
    layout = [
        f"TP{parallel.tensor_model_parallel_size}{' (SP)' if parallel.sequence_parallel else ''}",
        f"PP{parallel.pipeline_model_parallel_size}{f' (VPP{chunks})' if chunks else ''}",
        f"CP{parallel.context_parallel_size}",
        f"DP{plan.accepted.replicas}",
    ]
    alone = f", and {sizes.serving * sizes.per_node} that only sample" if sizes.serving else ""
    yield f"{plan.config.model.path}: {plan.parameters:,} parameters" + (
        f", and {plan.log_z_parameters:,} of log Z" if plan.log_z_parameters else ""
    )
    yield f"{sizes.training * sizes.per_node} {plan.options.gpu} train, {' x '.join(layout)}{alone}"
    yield f"prompts of {load.prompt_tokens} tokens, answers of {load.response_tokens} on average"
    for note in plan.accepted.notes:
        yield f"note: {note}"


def _memory(plan: Plan) -> Iterator[str]:
    result, room = plan.estimate, plan.setting.gpu.memory
    fullest = result.fullest
    stage = f" (pipeline stage {result.stages.index(fullest)}, the fullest)" if len(result.stages) > 1 else ""
    yield f"memory of a rank that trains, GB{stage}:"
    for kind, size in fullest.kinds.items():
        if size:
            yield f"  {_KINDS[kind]:26}{size / 1e9:8.2f}  {'#' * round(_BAR * size / room)}".rstrip()
    yield f"  {'together':26}{fullest.total / 1e9:8.2f}  of {room / 1e9:.1f}"
    if fullest.host:
        yield f"  {'reference, in host memory':26}{fullest.host / 1e9:8.2f}"
    sampler = result.sampler
    if sampler is not None:
        where = "on the same GPUs" if plan.config.rollout.colocated else "on GPUs of its own"
        yield f"memory of a vLLM worker {where}, GB:"
        yield f"  {'weights':26}{sampler.weights / 1e9:8.2f}"
        yield f"  {'keys and values':26}{sampler.kv_cache / 1e9:8.2f}  of {sampler.kv_tokens:,} tokens"
        yield f"  {'working memory':26}{sampler.working / 1e9:8.2f}"


def _time(plan: Plan) -> Iterator[str]:
    result = plan.estimate
    yield "seconds of a step:"
    for phase, seconds in result.seconds.items():
        yield f"  {_PHASES[phase]:26}{seconds:8.1f}  {'#' * round(_BAR * seconds / result.step)}".rstrip()
    yield f"  {'together':26}{result.step:8.1f}"
    sampled = result.sampling
    if sampled is not None:
        yield f"a server has {sampled.concurrency:.0f} answers under way on average, {sampled.most} at most"
    yield (
        f"an update has {result.micro_batches} micro-batches a rank; of its time {result.bubble:.1%} are the "
        f"pipeline's bubble, {result.communication:.1%} tensor-parallel communication"
    )


def _verdict(plan: Plan) -> Iterator[str]:
    run, gpu = plan.config.run, plan.setting.gpu
    yield (
        f"{run.steps} steps: {plan.hours:.1f} hours on {plan.gpus} {plan.options.gpu}, {plan.cost:,.0f} dollars at "
        f"{gpu.price:g} a GPU hour"
    )
    name = plan.options.gpu
    yield f"it does not fit the {name}:" if plan.estimate.problems else f"it fits the {name}"
    for problem in plan.estimate.problems:
        yield f"  {problem}"


def _better(plan: Plan) -> Iterator[str]:
    if not plan.better:
        yield "no layout that was tried " + ("fits" if plan.estimate.problems else "is clearly faster")
        return
    yield "better on the same GPUs:"
    for one in plan.better:
        memory = one.estimate.fullest.total / 1e9
        yield f"  {one.estimate.step:8.1f} s, {memory:5.1f} GB  {' '.join(one.overrides)}"


__all__ = ["as_json", "as_text"]
