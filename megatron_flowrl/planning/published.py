"""Published times beside what the model of time says, each with its inputs and its source.

Two constants of hardware.yaml were fitted: `fp8` to Megatron-Bridge's Llama 3 8B, `busy` to NeMo-RL's Qwen3 32B. Every
other row is a prediction. For pre-training, on micro-batches of one length, `busy` is 1. What NeMo-RL does not publish,
the length of prompts, is taken for 128 tokens; Megatron-Bridge's runs hide tensor-parallel communication, which this
program does not, nor does the model: it is slower there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_flowrl.config import Config, Sizes, load_config
from megatron_flowrl.data.packing import PackingRules, packing_alignment
from megatron_flowrl.model.objective import build_objective
from megatron_flowrl.planning.compute import Machine, optimizer_time, pass_time
from megatron_flowrl.planning.estimate import Setting, estimate
from megatron_flowrl.planning.hardware import read_hardware
from megatron_flowrl.planning.parameters import counted_stages
from megatron_flowrl.planning.shapes import find_shapes
from megatron_flowrl.planning.workload import Workload, mini_batch_load

BRIDGE = "Megatron-Bridge, docs/performance-summary-archive.md (commit 0a25f91)"
NEMO_RL = "NeMo-RL v0.4, docs/about/performance-summary.md (commit 06beed9), examples/configs/recipes/llm/performance"


@dataclass(frozen=True)
class Figure:
    """A published number, what it was measured with, and what the model says in the same unit."""

    name: str
    published: float
    unit: str
    inputs: str
    source: str
    fitted: str | None
    predict: Callable[[], float]

    @property
    def error(self) -> float:
        """Relative: above 0 where the model says more."""
        return self.predict() / self.published - 1


def dense_tokens_per_second(
    model: str, gpus: int, batch: int, layout: Mapping[str, Any], length: int = 8192, dtype: str = "fp8"
) -> float:
    """Tokens a second a GPU of pre-training on H100s: sequences of one length, a label for every token."""
    settings = {f"parallel.{key}": value for key, value in layout.items()}
    if dtype == "fp8":
        settings["precision.fp8"] = "hybrid"
    settings |= {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
    config = load_config(None, [f"{key}={_text(value)}" for key, value in settings.items()])
    hardware = read_hardware()
    hardware = replace(hardware, efficiency=replace(hardware.efficiency, busy=1.0))
    architecture, parallel = find_shapes(model).architecture, config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    replicas = gpus // ranks
    alignments = packing_alignment(parallel.tensor_model_parallel_size, parallel.context_parallel_size, False)
    rules = PackingRules(
        data_parallel_size=replicas,
        tokens_per_micro_batch=length,
        sequence_alignment=alignments[0],
        micro_batch_alignment=alignments[1],
    )
    load = replace(mini_batch_load((length - 1,) * batch, 1, rules), labels=float(length * batch / replicas))
    machine = Machine(hardware, hardware.gpu("H100"), 8, replicas)
    seconds = pass_time(architecture, config, machine, load, training=True).seconds
    stages = counted_stages(architecture, config)
    seconds += max(sum(optimizer_time(config, machine, stage)) for stage in stages)
    return length * batch / seconds / gpus


def step_seconds(model: str, gpus: int, settings: Mapping[str, Any], prompt: int, response: int) -> float:
    """Seconds of a step of GRPO with a reference model, colocated, on H100s."""
    config = load_config(None, [f"{key}={_text(value)}" for key, value in settings.items()])
    return estimate(config, _setting(config, model, gpus, prompt, response)).step


def _setting(config: Config, model: str, gpus: int, prompt: int, response: int) -> Setting:
    hardware = read_hardware()
    architecture, needs = find_shapes(model).architecture, build_objective(config).needs
    sizes = Sizes(training=gpus // 8, serving=0, per_node=8)
    return Setting(architecture, needs, hardware, hardware.gpu("H100"), sizes, Workload(prompt, response))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_NEMO: dict[str, Any] = {
    "objective.name": "grpo",
    "objective.force_old_pass": True,
    "run.prompts_per_step": 64,
    "run.prompts_per_mini_batch": 16,
    "generation.n": 32,
    "generation.max_tokens": 3968,
    "data.tokens_per_micro_batch": 4096,
    "rollout.colocated": True,
    "rollout.extra_arguments": "[--gpu-memory-utilization=0.6]",
    "recompute.recompute_granularity": "full",
    "recompute.recompute_method": "uniform",
    "recompute.recompute_num_layers": 1,
}
_PROMPT = 128  # of OpenMathInstruct-2; not published, and of little weight
_TP4_PP8 = {
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 8,
    "virtual_pipeline_model_parallel_size": 5,
    "sequence_parallel": True,
}
_TP8_PP8_CP2 = {
    **_TP4_PP8,
    "tensor_model_parallel_size": 8,
    "context_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 8,
}
_RATE = "tokens/s/GPU"

FIGURES = (
    Figure(
        "Llama 3 8B pre-training, 25.11", 14451, _RATE,
        "8 H100, FP8, sequences of 8,192, batch 128, data parallel (FSDP)", BRIDGE,
        "efficiency.fp8", lambda: dense_tokens_per_second("Llama-3.1-8B", 8, 128, {}),
    ),
    Figure(
        "Llama 3 70B pre-training, 25.11", 1602, _RATE,
        "64 H100, FP8, sequences of 8,192, batch 128, TP4 PP8 VP5", BRIDGE,
        None, lambda: dense_tokens_per_second("Llama-3.1-70B", 64, 128, _TP4_PP8),
    ),
    Figure(
        "Llama 3 70B pre-training, 26.02", 1621, _RATE,
        "64 H100, FP8, sequences of 8,192, batch 256, TP4 PP8 VP5", BRIDGE,
        None, lambda: dense_tokens_per_second("Llama-3.1-70B", 64, 256, _TP4_PP8),
    ),
    Figure(
        "Llama 3.1 405B pre-training, 26.02", 311, _RATE,
        "1,024 H100, FP8, sequences of 8,192, batch 1,536, TP8 PP8 CP2 VP8", BRIDGE,
        None, lambda: dense_tokens_per_second("Llama-3.1-405B", 1024, 1536, _TP8_PP8_CP2),
    ),
    Figure(
        "Llama 3.1 8B GRPO step", 97.7, "s",
        "16 H100, BF16, 64 prompts x 32 answers, mean length 1,060 of 4,096, updates of 512, PP2, full recomputation, "
        "vLLM TP1 on the same GPUs", NEMO_RL,
        None,
        lambda: step_seconds(
            "Llama-3.1-8B", 16,
            {**_NEMO, "parallel.pipeline_model_parallel_size": 2, "rollout.servers": 8}, _PROMPT, 1060 - _PROMPT,
        ),
    ),
    Figure(
        "Qwen3 32B GRPO step", 393, "s",
        "32 H100, BF16, 64 prompts x 32 answers, mean length 3,206 of 4,096, updates of 512, TP4 PP4 with sequence "
        "parallelism, full recomputation, vLLM TP4 on the same GPUs", NEMO_RL,
        "efficiency.busy",
        lambda: step_seconds(
            "Qwen3-32B", 32,
            {
                **_NEMO,
                "parallel.tensor_model_parallel_size": 4,
                "parallel.sequence_parallel": True,
                "parallel.pipeline_model_parallel_size": 4,
                "rollout.tensor_parallel_size": 4,
                "rollout.servers": 2,
            },
            _PROMPT, 3206 - _PROMPT,
        ),
    ),
)  # fmt: skip

__all__ = ["FIGURES", "Figure"]
