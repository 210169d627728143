"""Whether a model can be cut as the configuration says: known from config.json alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.model.architecture import Architecture


def check_layout(architecture: Architecture, config: Config) -> None:
    """Refuse a layout that does not fit the model. Raises UserError with every problem found."""
    problems = [*_tensor_parallel(architecture, config), *_pipeline(architecture, config), *_rest(architecture, config)]
    if problems:
        raise UserError(*problems)


def max_sequence_length(architecture: Architecture, config: Config) -> int:
    """The longest sequence accepted, in tokens."""
    return config.model.max_sequence_length or architecture.max_sequence_length


def _tensor_parallel(architecture: Architecture, config: Config) -> Iterator[str]:
    size = config.parallel.tensor_model_parallel_size
    setting = f"parallel.tensor_model_parallel_size = {size}"
    for key, count in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("intermediate_size", architecture.ffn_hidden_size),
    ):
        if count % size:
            yield f"{setting} does not divide the model's {key} = {count}; choose a divisor of {count}"
    groups = architecture.num_query_groups
    if groups % size and size % groups:
        yield (
            f"{setting} and the model's num_key_value_heads = {groups} do not divide one another; "
            f"choose a divisor or a multiple of {groups}"
        )


def _pipeline(architecture: Architecture, config: Config) -> Iterator[str]:
    parallel = config.parallel
    stages, layers = parallel.pipeline_model_parallel_size, architecture.num_layers
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    given = [count for count in (first, last) if count is not None]
    even_stages, even_layers = stages - len(given), layers - sum(given)
    if stages == 1:
        return
    if given:
        ends = f"{first or 'an even share of'} layers on the first stage and {last or 'an even share of'} on the last"
        shared_evenly = even_layers % even_stages == 0 if even_stages else even_layers == 0
        if even_layers < even_stages or not shared_evenly:
            yield (
                f"parallel.num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage: {ends} leave "
                f"{even_layers} of the model's {layers} layers for {even_stages} stages; they must share them evenly"
            )
            return
    elif layers % stages:
        yield (
            f"parallel.pipeline_model_parallel_size = {stages} does not divide the model's {layers} layers; choose a "
            "divisor, or set parallel.num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
        return
    chunks = parallel.virtual_pipeline_model_parallel_size
    per_stage = even_layers // even_stages if even_stages else 0
    if chunks and per_stage % chunks:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size = {chunks} does not divide the {per_stage} layers of a "
            "pipeline stage; choose a divisor"
        )


def _rest(architecture: Architecture, config: Config) -> Iterator[str]:
    recompute, precision, layers = config.recompute, config.precision, architecture.num_layers
    if recompute.recompute_num_layers and recompute.recompute_num_layers > layers:
        yield f"recompute.recompute_num_layers = {recompute.recompute_num_layers} is above the model's {layers} layers"
    if precision.first_last_layers_bf16:
        kept = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
        if kept > layers:
            yield (
                f"precision.num_layers_at_start_in_bf16 + num_layers_at_end_in_bf16 = {kept} is above the model's "
                f"{layers} layers"
            )
    wanted, limit = config.model.max_sequence_length, architecture.max_sequence_length
    if wanted and wanted > limit:
        yield (
            f"model.max_sequence_length = {wanted} is above what the model's attention is defined for, {limit} tokens "
            "(position limit or sliding window)"
        )
    if precision.fp8:
        size = config.parallel.tensor_model_parallel_size
        for key, width in (
            ("hidden_size", architecture.hidden_size),
            ("intermediate_size / TP", architecture.ffn_hidden_size // size),
            ("attention width / TP", architecture.num_attention_heads * architecture.head_dim // size),
        ):
            if width % 16:
                yield f"precision.fp8 = {precision.fp8}: {key} = {width} must be a multiple of 16 for FP8 products"
