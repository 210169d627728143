"""Whether a model can be cut as the configuration says: known from config.json alone, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_flowrl.config import Config, ParallelConfig, PrecisionConfig, UserError
from megatron_flowrl.model.architecture import Architecture


def check_layout(architecture: Architecture, config: Config) -> None:
    """Refuse a layout that does not fit the model. Raises UserError with every problem found."""
    problems = [*_tensor_parallel(architecture, config), *_pipeline(architecture, config)]
    if not problems:
        problems += _rest(architecture, config)
    if problems:
        raise UserError(*problems)


def max_sequence_length(architecture: Architecture, config: Config) -> int:
    """The longest sequence accepted, in tokens."""
    return config.model.max_sequence_length or architecture.max_sequence_length


def fp8_multiple(precision: PrecisionConfig) -> int:
    """What FP8 wants the sides of a matrix product to be a multiple of (Megatron's `get_fp8_align_size`); 1 without."""
    return 1 if precision.fp8 is None else 32 if precision.fp8_recipe == "mxfp8" else 16


def fp8_widths(architecture: Architecture, tensor_parallel_size: int) -> dict[str, int]:
    """Sides of a rank's matrix products, which have to be such multiples, by what they are called."""
    heads = architecture.num_attention_heads + 2 * architecture.num_query_groups
    return {
        "query, key and value width / TP": heads * architecture.head_dim // tensor_parallel_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size / TP": architecture.ffn_hidden_size // tensor_parallel_size,
        "attention width / TP": architecture.num_attention_heads * architecture.head_dim // tensor_parallel_size,
    }


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up to a multiple of `divisible_by` times the tensor-parallel size, as Megatron does."""
    multiple = divisible_by * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


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


def _layers_of_chunks(layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of the model chunks of every pipeline stage, for a split that `_pipeline` finds nothing wrong with."""
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    ends = [count for count in (first, last) if count is not None]
    inner = stages - len(ends)
    counts = ends + [(layers - sum(ends)) // inner] * min(inner, 1) if inner else ends
    return [count // chunks for count in counts]


def _rest(architecture: Architecture, config: Config) -> Iterator[str]:
    recompute, precision, layers = config.recompute, config.precision, architecture.num_layers
    unit, chunks = recompute.recompute_num_layers, _layers_of_chunks(layers, config.parallel)
    if unit and unit > max(chunks):
        yield f"recompute.recompute_num_layers = {unit} is above the {max(chunks)} layers of a pipeline stage's chunk"
    elif unit and recompute.recompute_method == "uniform" and any(count % unit for count in chunks):
        yield (
            f"recompute.recompute_num_layers = {unit} must divide the layers of every chunk for recompute_method = "
            f"uniform; chunks have {', '.join(map(str, sorted(set(chunks))))}"
        )
    if precision.first_last_layers_bf16:
        kept = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
        if kept > layers:
            yield (
                f"precision.num_layers_at_start_in_bf16 + num_layers_at_end_in_bf16 = {kept} is above the model's "
                f"{layers} layers"
            )
        most = layers // config.parallel.pipeline_model_parallel_size
        for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(precision, key) > most:
                yield f"precision.{key} = {getattr(precision, key)} is above the {most} layers of a pipeline stage"
    wanted, limit = config.model.max_sequence_length, architecture.max_sequence_length
    if wanted and wanted > limit:
        yield (
            f"model.max_sequence_length = {wanted} is above what the model's attention is defined for, {limit} tokens "
            "(position limit or sliding window)"
        )
    if precision.fp8:
        multiple = fp8_multiple(precision)
        for key, width in fp8_widths(architecture, config.parallel.tensor_model_parallel_size).items():
            if width % multiple:
                yield (
                    f"precision.fp8 = {precision.fp8} ({precision.fp8_recipe}): {key} = {width} must be a multiple of "
                    f"{multiple} for FP8 products"
                )
