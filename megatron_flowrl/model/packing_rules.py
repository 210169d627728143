"""The packing plan of a step under the configured layout."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.packing import (
    PackingPlan,
    PackingRules,
    SequenceTooLong,
    attention_crossover_tokens,
    packing_alignment,
    plan_packing,
)
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.layout import fp8_multiple


def packing_rules(config: Config, architecture: Architecture, data_parallel_size: int) -> PackingRules:
    """What the layout asks of a plan. Raises UserError where the token budget is below the alignment."""
    parallel = config.parallel
    sequence, micro_batch = packing_alignment(
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.sequence_parallel,
        fp8_multiple(config.precision),
    )
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    try:
        return PackingRules(
            data_parallel_size=data_parallel_size,
            tokens_per_micro_batch=config.data.tokens_per_micro_batch,
            sequence_alignment=sequence,
            micro_batch_alignment=micro_batch,
            micro_batch_group=parallel.pipeline_model_parallel_size if interleaved else 1,
            attention_crossover=attention_crossover_tokens(architecture.hidden_size),
        )
    except ValueError as error:
        raise UserError(f"data.tokens_per_micro_batch = {config.data.tokens_per_micro_batch}: {error}") from None


def plan(lengths: Sequence[int], rules: PackingRules, mini_batch_of: Sequence[int] | None = None) -> PackingPlan:
    """`plan_packing`, with a sequence above the budget told as the setting it is about."""
    try:
        return plan_packing(lengths, rules, mini_batch_of)
    except SequenceTooLong as error:
        raise UserError(
            f"data.tokens_per_micro_batch = {error.budget} is too small for sequence number {error.index + 1} "
            f"of {error.length} tokens; raise it, or leave the sequence out"
        ) from None
