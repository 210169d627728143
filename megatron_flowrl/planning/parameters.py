"""The parameters of every pipeline stage: counted from the architecture, as the real model has them.

`real_stages` of `meta` reads them from Megatron's own modules; the search, which looks at hundreds of layouts, counts.
A test holds the two against one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.layout import padded_vocab_size

FP32_BYTES = 4


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank: its elements, bytes of an element as the model holds it, and what it is.

    shared: an embedding that two pipeline stages hold alike; matrix: a weight that FP8 products are made of.
    """

    name: str
    elements: int
    itemsize: int
    shared: bool = False
    matrix: bool = False


Chunk = tuple[Parameter, ...]
Stage = tuple[Chunk, ...]  # one chunk, or as many as virtual_pipeline_model_parallel_size


def layers_of_stages(architecture: Architecture, config: Config) -> list[int]:
    """Layers of each pipeline stage, for a layout that `check_layout` finds nothing wrong with."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    counts: list[int | None] = [None] * stages
    if stages > 1:
        counts[0] = parallel.num_layers_in_first_pipeline_stage
        counts[-1] = parallel.num_layers_in_last_pipeline_stage
    rest = architecture.num_layers - sum(count for count in counts if count is not None)
    even = counts.count(None)
    return [rest // even if count is None else count for count in counts]


def counted_stages(
    architecture: Architecture, config: Config, *, log_z: bool = False, value_head: bool = False
) -> list[Stage]:
    """The parameters of a rank of each pipeline stage, chunk by chunk, in no order that means anything."""
    parallel = config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    per_stage = layers_of_stages(architecture, config)
    stages: list[Stage] = []
    for stage, layers in enumerate(per_stage):
        made = []
        for chunk in range(chunks):
            first = stage == 0 and chunk == 0
            last = stage == len(per_stage) - 1 and chunk == chunks - 1
            one = [p for _ in range(layers // chunks) for p in _layer(architecture, config)]
            one += _ends(architecture, config, first, last, log_z, value_head)
            made.append(tuple(one))
        stages.append(tuple(made))
    return stages


def total_elements(architecture: Architecture) -> int:
    """Parameters of the language model, each once, without vocabulary padding: what Hugging Face counts."""
    h, d = architecture.hidden_size, architecture.head_dim
    layer = 2 * h + (2 * d if architecture.qk_norm else 0)
    if architecture.qkv_bias:
        layer += (architecture.num_attention_heads + 2 * architecture.num_query_groups) * d
    vocabularies = 1 if architecture.tie_word_embeddings else 2
    return (
        matrix_elements(architecture) + architecture.num_layers * layer + vocabularies * architecture.vocab_size * h + h
    )


def matrix_elements(architecture: Architecture) -> int:
    """Of these, the weights of the layers' products, which FP8 is for."""
    h, d = architecture.hidden_size, architecture.head_dim
    queries, keys = architecture.num_attention_heads * d, architecture.num_query_groups * d
    return architecture.num_layers * (h * (queries + 2 * keys) + queries * h + 3 * h * architecture.ffn_hidden_size)


def _layer(architecture: Architecture, config: Config) -> Iterator[Parameter]:
    size, itemsize = config.parallel.tensor_model_parallel_size, itemsize_of(config)
    matrix = 1 if config.precision.fp8_param_gather else itemsize
    h, d, ffn = architecture.hidden_size, architecture.head_dim, architecture.ffn_hidden_size // size
    queries = architecture.num_attention_heads * d
    qkv = (queries + 2 * architecture.num_query_groups * d) // size
    yield Parameter("linear_proj.weight", h * queries // size, matrix, matrix=True)
    yield Parameter("linear_qkv.layer_norm_weight", h, itemsize)
    yield Parameter("linear_qkv.weight", h * qkv, matrix, matrix=True)
    if architecture.qkv_bias:
        yield Parameter("linear_qkv.bias", qkv, itemsize)
    if architecture.qk_norm:
        yield Parameter("q_layernorm.weight", d, itemsize)
        yield Parameter("k_layernorm.weight", d, itemsize)
    yield Parameter("linear_fc1.layer_norm_weight", h, itemsize)
    yield Parameter("linear_fc1.weight", h * 2 * ffn, matrix, matrix=True)
    yield Parameter("linear_fc2.weight", h * ffn, matrix, matrix=True)


def _ends(
    architecture: Architecture, config: Config, first: bool, last: bool, log_z: bool, value_head: bool
) -> Iterator[Parameter]:
    size, itemsize, h = config.parallel.tensor_model_parallel_size, itemsize_of(config), architecture.hidden_size
    vocabulary = padded_vocab_size(architecture.vocab_size, config.model.make_vocab_size_divisible_by, size) // size
    tied = architecture.tie_word_embeddings and not value_head
    shared = tied and config.parallel.pipeline_model_parallel_size > 1
    if first:
        yield Parameter("word_embeddings.weight", vocabulary * h, itemsize, shared)
    if not last:
        return
    yield Parameter("final_layernorm.weight", h, itemsize)
    if value_head:
        yield Parameter("value.weight", h, FP32_BYTES)
        yield Parameter("value.bias", 1, FP32_BYTES)
    elif not (tied and first):
        yield Parameter("output_layer.weight", vocabulary * h, itemsize, shared)
    if log_z:
        for count in (h * h, h, h, h, h * h, h, h, h, h, 1):
            yield Parameter("log_z", count, FP32_BYTES)


def itemsize_of(config: Config) -> int:
    """Bytes of an element in precision.dtype."""
    return 2 if config.precision.dtype == "bfloat16" else 4


__all__ = [
    "Chunk",
    "Parameter",
    "Stage",
    "counted_stages",
    "itemsize_of",
    "layers_of_stages",
    "matrix_elements",
    "total_elements",
]
