"""The recipe with a small model in the place of its own: the layout and its logic are kept, widths and lengths are not.

Kept: TP, SP, PP, VPP, CP where they make at most eight ranks; the number of layers, and which stage has which; the
numbers of heads, so that TP cuts them as in truth; objective, optimizer, recomputation, reference, DDP's overlaps,
checkpoints; FP8, whose numbers a CPU has too. What it has not is left out, and `notes` says what was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_flowrl.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    PromptsConfig,
    RecomputeConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrackingConfig,
)
from megatron_flowrl.data.packing import packing_alignment
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.layout import fp8_multiple, fp8_widths
from megatron_flowrl.platform import recomputes_linear_layers

MOST_RANKS = 8
PROMPTS, PROMPTS_PER_MINI_BATCH, MOST_ANSWERS = 4, 2, 4
PROMPT_TOKENS, ANSWER_TOKENS = 8, 24
VOCABULARY, EOS = 515, 1  # 515: divisible by nothing a layout would like
_HEADS = (4, 8, 16, 32, 64, 128)  # elements of a head: the first that FP8's products can be made of


@dataclass(frozen=True)
class SmallRun:
    """A run of two steps on recorded answers, by `config`, on so many ranks, of a model with such a config.json."""

    config: Config
    ranks: int
    model: dict[str, Any]
    notes: tuple[str, ...]


def on_a_cpu(config: Config) -> tuple[Config, list[str]]:
    """Without what needs a GPU; and the settings that were left out."""
    precision, recompute, rollout, dropped = config.precision, config.recompute, config.rollout, []
    if precision.fp8_param_gather:
        dropped.append("precision.fp8_param_gather = true")
        precision = replace(precision, fp8_param_gather=False)
    if precision.fp8 and precision.fp8_recipe == "delayed" and recomputes_linear_layers(recompute):
        dropped.append(f"recompute.recompute_granularity = {recompute.recompute_granularity} (with delayed scales)")
        recompute = RecomputeConfig()
    if rollout.quantization is not None:
        dropped.append(f"rollout.quantization = {rollout.quantization}")
        rollout = replace(rollout, quantization=None)
    return replace(config, precision=precision, recompute=recompute, rollout=rollout), dropped


def small_run(config: Config, architecture: Architecture, replicas: int, folder: Path) -> SmallRun:
    """The small form of a recipe that fits its model, on two data-parallel ranks where there is room; in `folder`."""
    config, dropped = on_a_cpu(config)
    parallel, layers = _few_ranks(config.parallel, architecture.num_layers)
    ranks = _ranks(parallel)
    twice = replicas > 1 and 2 * ranks <= MOST_RANKS
    ranks *= 2 if twice else 1
    notes = [f"left out, as it needs a GPU: {', '.join(dropped)}"] if dropped else []
    precision, most = config.precision, layers // parallel.pipeline_model_parallel_size
    if precision.first_last_layers_bf16:
        precision = replace(
            precision,
            num_layers_at_start_in_bf16=min(precision.num_layers_at_start_in_bf16, most),
            num_layers_at_end_in_bf16=min(precision.num_layers_at_end_in_bf16, most),
        )
    notes += _changes(config.parallel, parallel, architecture.num_layers, layers)
    recompute = config.recompute
    if recompute.recompute_num_layers and layers != architecture.num_layers:
        recompute = replace(recompute, recompute_num_layers=1)
    answers, overlong = min(config.generation.n, MOST_ANSWERS), config.objective.overlong_buffer
    small = replace(
        config,
        run=RunConfig(
            folder=str(folder / "run"),
            steps=2,
            prompts_per_step=PROMPTS,
            prompts_per_mini_batch=PROMPTS_PER_MINI_BATCH,
        ),
        model=ModelConfig(path=str(folder / "model"), init="random"),
        parallel=parallel,
        precision=precision,
        recompute=recompute,
        objective=replace(config.objective, overlong_buffer=overlong and min(overlong, ANSWER_TOKENS)),
        prompts=PromptsConfig(),
        reward=RewardConfig(),
        data=DataConfig(tokens_per_micro_batch=_token_budget(parallel, fp8_multiple(precision))),
        log_prob=replace(config.log_prob, chunk_bytes=None),
        rollout=RolloutConfig(replay=str(folder / "records")),
        generation=GenerationConfig(n=answers, max_tokens=ANSWER_TOKENS),
        evaluation=EvaluationConfig(),
        checkpoint=CheckpointConfig(save_interval=1, async_save=config.checkpoint.async_save),
        tracking=TrackingConfig(tensorboard=False, samples=0, peak_tflops=1.0),
        logging=LoggingConfig(progress=False),
    )
    return SmallRun(small, ranks, _model(architecture, parallel, layers, fp8_multiple(precision)), tuple(notes))


def _token_budget(parallel: ParallelConfig, multiple: int) -> int:
    """Room for three answers, in whole numbers of what a micro-batch is padded to."""
    _, alignment = packing_alignment(
        parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.sequence_parallel, multiple
    )
    return -(-3 * (PROMPT_TOKENS + ANSWER_TOKENS) // alignment) * alignment


def _ranks(parallel: ParallelConfig) -> int:
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )  # fmt: skip


def _few_ranks(parallel: ParallelConfig, layers: int) -> tuple[ParallelConfig, int]:
    """A layout of at most MOST_RANKS that still has every kind of parallelism, and layers for its stages."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    ends = [count for count in (first, last) if count is not None]
    inner = (layers - sum(ends)) // (stages - len(ends)) if stages > len(ends) else 0
    while tensor * context * stages > MOST_RANKS:
        if context > 2:
            context //= 2
        elif tensor > 2:
            tensor //= 2
        elif stages > 2:
            layers, stages = layers - inner, stages - 1
        else:
            context = 1
    few = replace(
        parallel,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        pipeline_model_parallel_size=stages,
        distributed_timeout_minutes=ParallelConfig().distributed_timeout_minutes,
    )
    return few, layers


def _changes(true: ParallelConfig, few: ParallelConfig, layers: int, kept: int) -> list[str]:
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    changed = [(name, getattr(true, name), getattr(few, name)) for name in names]
    found = [f"parallel.{name}: {now} instead of {before}" for name, before, now in changed if now != before]
    return found + ([f"{kept} of the {layers} layers"] if kept != layers else [])


def _model(architecture: Architecture, parallel: ParallelConfig, layers: int, multiple: int) -> dict[str, Any]:
    """config.json of the same family and heads, whose heads have few elements, in widths that are such multiples."""
    heads, ranks = architecture.num_attention_heads, parallel.tensor_model_parallel_size
    narrow = (
        replace(architecture, head_dim=size, hidden_size=heads * size, ffn_hidden_size=max(16, multiple) * ranks)
        for size in _HEADS
    )
    found = next(one for one in narrow if not any(width % multiple for width in fp8_widths(one, ranks).values()))
    model: dict[str, Any] = {
        "model_type": architecture.family,
        "hidden_size": found.hidden_size,
        "intermediate_size": found.ffn_hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": architecture.num_query_groups,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * (PROMPT_TOKENS + ANSWER_TOKENS),
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "hidden_act": "silu",
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    if architecture.family != "qwen2":
        model["head_dim"] = found.head_dim
    return model | ({"sliding_window": None} if architecture.family == "mistral" else {})


def write_model(run: SmallRun) -> None:
    """Its folder, which needs no weights."""
    folder = Path(run.config.model.path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run.model, indent=2))


__all__ = ["ANSWER_TOKENS", "EOS", "PROMPT_TOKENS", "VOCABULARY", "SmallRun", "on_a_cpu", "small_run", "write_model"]
