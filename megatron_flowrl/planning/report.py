"""A plan as text for people, and as JSON for machines."""

from __future__ import annotations

import math
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
_NOT_MEASURED = {"activations": "  (by Transformer Engine's documentation)"}
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
    """Bytes, seconds, dollars; None: not known."""
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
        "notes": list(plan.notes),
        "seconds": {phase: _known(seconds) for phase, seconds in [*result.seconds.items(), ("step", result.step)]},
        "sampling": asdict(result.sampling) if result.sampling else None,
        "update": {
            "micro_batches": result.micro_batches,
            "bubble_share": result.bubble,
            "tensor_parallel_communication_share": result.communication,
        },
        "evaluation": {
            "prompts": plan.setting.held_out,
            "seconds": _known(result.evaluation) if plan.setting.held_out is not None else None,
            "times": plan.evaluations,
        },
        "run": {"steps": plan.config.run.steps, "hours": _known(plan.hours), "dollars": _known(plan.cost)},
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


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _rank(memory: RankMemory) -> dict[str, float]:
    return {
        **memory.kinds,
        "total": memory.total,
        "resident": memory.resident,
        "transfer": memory.transfer,
        "host": memory.host,
    }


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
    for note in plan.notes:
        yield f"note: {note}"


def _memory(plan: Plan) -> Iterator[str]:
    result, room = plan.estimate, plan.setting.gpu.memory
    fullest = result.fullest
    stage = f" (pipeline stage {result.stages.index(fullest)}, the fullest)" if len(result.stages) > 1 else ""
    yield f"memory of a rank that trains, GB{stage}:"
    for kind, size in fullest.kinds.items():
        if size:
            bar = "#" * round(_BAR * size / room)
            yield f"  {_KINDS[kind]:26}{size / 1e9:8.2f}  {bar}{_NOT_MEASURED.get(kind, '')}".rstrip()
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
        if plan.config.rollout.colocated:
            kept = max(result.stages, key=lambda rank: rank.resident)
            sends = f"{kept.transfer / 1e9:.2f} of it to send weights"
            yield f"  {'kept there by training':26}{kept.resident / 1e9:8.2f}  {sends}"
            yield f"  {'together':26}{(kept.resident + sampler.limit) / 1e9:8.2f}  of {room / 1e9:.1f}"


def _time(plan: Plan) -> Iterator[str]:
    result = plan.estimate
    yield "seconds of a step:"
    for phase, seconds in result.seconds.items():
        bar = "" if math.isnan(result.step) else "#" * round(_BAR * seconds / result.step)
        yield f"  {_PHASES[phase]:26}{_seconds(seconds)}  {bar}".rstrip()
    yield f"  {'together':26}{_seconds(result.step)}"
    sampled = result.sampling
    if sampled is not None:
        yield f"a server has {sampled.concurrency:.0f} answers under way on average, {sampled.most} at most"
    yield (
        f"an update has {result.micro_batches} micro-batches a rank; of its time {result.bubble:.1%} are the "
        f"pipeline's bubble, {result.communication:.1%} tensor-parallel communication"
    )


def _seconds(seconds: float) -> str:
    return "not known" if math.isnan(seconds) else f"{seconds:8.1f}"


def _verdict(plan: Plan) -> Iterator[str]:
    run, gpu = plan.config.run, plan.setting.gpu
    if plan.evaluations and plan.setting.held_out is not None:
        yield (
            f"an evaluation of {plan.setting.held_out * plan.config.evaluation.n:,} answers: "
            f"{_seconds(plan.estimate.evaluation).strip()} s, {plan.evaluations} times"
        )
    if math.isnan(plan.hours):
        yield f"{run.steps} steps: hours and dollars are not known, as the servers have no room for keys and values"
    else:
        yield (
            f"{run.steps} steps: {plan.hours:.1f} hours on {plan.gpus} {plan.options.gpu}, {plan.cost:,.0f} dollars at "
            f"{gpu.price:g} a GPU hour"
        )
    name = plan.options.gpu
    yield f"it does not fit the {name}:" if plan.estimate.problems else f"it fits the {name}"
    for problem in plan.estimate.problems:
        yield f"  {problem}"


def _better(plan: Plan) -> Iterator[str]:
    if not plan.estimate.sampler_fits:
        yield "no other layout was looked for: what does not fit is the sampler, which the search leaves as it is"
        return
    if not plan.better:
        yield "no layout that was tried " + ("fits" if plan.estimate.problems else "is clearly faster")
        return
    yield "better on the same GPUs:"
    for one in plan.better:
        memory = one.estimate.fullest.total / 1e9
        yield f"  {one.estimate.step:8.1f} s, {memory:5.1f} GB  {' '.join(one.overrides)}"


__all__ = ["as_json", "as_text"]
