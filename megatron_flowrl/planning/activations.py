"""What the forward pass keeps for the backward pass, in bytes of a rank, module by module.

Letters: n tokens of the micro-batch on a context-parallel rank, s those that a rank keeps of the residual stream (n /
TP under sequence parallelism), h hidden size, q and k widths of queries and of keys on a tensor-parallel rank, f of the
MLP, a and g heads and key-value groups on it, d head dimension, b bytes of an element, c of an input of an FP8 product
(1, without FP8 b). A layer keeps:

    norm, linear_qkv      s h b + 4 s + s h c           its input, the norm's inverse root, the normed input
    heads' norms          n q b + 4 n (a + g)           Qwen3 only; the keys are a view
    attention             n (q + k) b + n (q + 2 k) b   after RoPE; values, a view of linear_qkv's output
                          + 4 n a + n q b               log-sum-exp, output (which is linear_proj's input)
    norm, linear_fc1      s h b + 4 s + s h c
    SwiGLU, linear_fc2    2 n f b + n f c               its input, its output

`transformer_engine`: FP8 adds a quantised n q copy of linear_proj's input, and CP > 1 the keys and values of the last
rank of the ring. `torch`, the CPU's layers, keep cosines and sines for each tensor that they turn (4 n d b), and a
packed copy of the attention's output (n q b). Under CP they keep the keys and values of all that a rank's queries see,
n (CP + 1/2) of each, in copies (linear_qkv's output then stays only for Qwen3's key norm), and a mask of b (2 CP + 1) /
(4 CP^2) for each pair of a sequence's tokens.

The torch variant is what tests/planning/test_measured.py measures. The other is what Transformer Engine's modules save
by their code (LayerNormLinear, Linear, FusedAttention); it has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.planning.parameters import itemsize_of, layers_of_stages

Engine = Literal["transformer_engine", "torch"]
_LOG_Z_TENSORS = 7  # of [prompts, h] in fp32, which its linears, GELUs and norms keep


@dataclass(frozen=True)
class MicroBatch:
    """Tokens, padding included, of all context-parallel ranks; of them labelled; sequences; sum of squared lengths."""

    tokens: int
    labels: int
    sequences: int
    pairs: float


@dataclass(frozen=True)
class Activations:
    """Bytes at the fullest moment of a stage's pass, in the parts that memory is reported by.

    kept: by the micro-batches in flight; log_prob: by the last stage's output (its working buffers are not part);
    log_z: by the partition function; recomputed: of what is computed again at a time, in so far as it does not fit
    where the last stage's output was, whose backward pass comes first.
    """

    kept: float
    recomputed: float
    log_prob: float
    log_z: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.kept + self.recomputed + self.log_prob + self.log_z


def layer_parts(
    architecture: Architecture, config: Config, micro_batch: MicroBatch, engine: Engine
) -> dict[str, float]:
    """Bytes that one layer keeps of a micro-batch without recomputation, by part."""
    parallel = config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    n, b, d = micro_batch.tokens / cp, itemsize_of(config), architecture.head_dim
    s, h, f = n / tp if parallel.sequence_parallel else n, architecture.hidden_size, architecture.ffn_hidden_size / tp
    a, g = architecture.num_attention_heads / tp, max(architecture.num_query_groups / tp, 1)
    q, k = a * d, g * d
    c = 1 if config.precision.fp8 else b
    norm = s * h * b + 4 * s + s * h * c
    gathers = engine == "torch" and cp > 1
    mixed, own_keys = n * (q + 2 * k) * b, 2 * n * k * b
    attended = 4 * n * a
    if gathers:
        inputs = n * q * b + own_keys + (mixed if architecture.qk_norm else 0)
        seen = 2 * n * (cp + 0.5) * k * b + micro_batch.pairs * b * (2 * cp + 1) / (4 * cp**2)
        attended += n * q * b + seen - own_keys
    else:
        inputs = n * q * b + n * k * b + mixed
        attended += n * q * b if engine == "torch" else own_keys if cp > 1 else 0
    projected = n * q * b + (n * q if config.precision.fp8 and engine == "transformer_engine" else 0)
    return {
        "attention_norm": norm,
        "rotary": 4 * n * d * b if engine == "torch" else 0.0,
        "head_norms": n * q * b + 4 * n * (a + g) if architecture.qk_norm else 0.0,
        "attention_inputs": inputs,
        "attention": attended,
        "projection": projected,
        "mlp_norm": norm,
        "mlp": 2 * n * f * b + n * f * c,
    }


def stage_activations(
    architecture: Architecture,
    config: Config,
    stage: int,
    micro_batch: MicroBatch,
    micro_batches: int,
    engine: Engine,
    *,
    log_z: bool = False,
) -> Activations:
    """Of a pipeline stage whose micro-batches, so many in a pass, are all as this one."""
    parallel, b, h = config.parallel, itemsize_of(config), architecture.hidden_size
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    n = micro_batch.tokens / cp
    s = n / tp if parallel.sequence_parallel else n
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    layers = layers_of_stages(architecture, config)[stage] // chunks
    parts = layer_parts(architecture, config, micro_batch, engine)
    chunk, again = _of_chunk(parts, layers, s * h * b, config)
    flying = chunks_in_flight(config, stage, micro_batches)
    last = stage == parallel.pipeline_model_parallel_size - 1
    # The last chunk's output is of the micro-batches of that chunk alone; on the last stage they pass one by one.
    final = s * h * b + 4 * s if last else 0.0
    log_prob = micro_batch.labels / cp * (h * b + 32) if last else 0.0
    of_log_z = _LOG_Z_TENSORS * micro_batch.sequences * h * 4.0 if last and log_z else 0.0
    beyond = max(0.0, again - final - log_prob - of_log_z)
    return Activations(flying * chunk + final, beyond, log_prob, of_log_z)


def chunks_in_flight(config: Config, stage: int, micro_batches: int) -> int:
    """The most forward passes of a chunk that a stage has done before their backward passes.

    Megatron's schedules: 1F1B begins with PP - 1 - stage passes, the interleaved one with
    2 (PP - 1 - stage) + (VPP - 1) PP; one more is under way when the first backward pass begins.
    """
    stages, chunks = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size
    ahead = stages - 1 - stage
    if chunks is not None:
        ahead = 2 * ahead + (chunks - 1) * stages
    return min(ahead + 1, micro_batches * (chunks or 1))


def _of_chunk(parts: dict[str, float], layers: int, hidden: float, config: Config) -> tuple[float, float]:
    """What a chunk keeps of a micro-batch, and what is there beside it while a part is computed again."""
    recompute, layer = config.recompute, sum(parts.values())
    if recompute.recompute_granularity is None:
        return layers * layer, 0.0
    if recompute.recompute_granularity == "full":
        unit = recompute.recompute_num_layers or 1
        if recompute.recompute_method == "uniform":
            return layers / unit * hidden, unit * layer - hidden
        again = min(unit, layers)
        return again * hidden + (layers - again) * layer, layer - hidden
    dropped = [parts["attention"]] if "core_attn" in recompute.recompute_modules else []
    if "mlp" in recompute.recompute_modules:
        dropped.append(parts["mlp"] + parts["mlp_norm"] - hidden)
    return layers * (layer - sum(dropped)), max(dropped)


__all__ = ["Activations", "Engine", "MicroBatch", "chunks_in_flight", "layer_parts", "stage_activations"]
