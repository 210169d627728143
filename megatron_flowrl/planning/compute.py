"""Seconds of a pass of the model over a mini-batch, and of an optimizer step.

A stage's forward pass takes, for T tokens, P = the sum of squared lengths and N labels, with the operations of
observe/flops.py,

    products     T layers 2 (h (a + 2 k) + a h + 3 h f) / (TP CP) / (peak x efficiency)
    attention    2 a P layers / (TP CP) / (peak x efficiency), in 16 bits
    output       2 h V N / (TP CP) / (peak x efficiency) on the last stage
    TP           4 collectives a layer of T / CP h b (TP - 1) / TP bytes
    CP           keys and values around the ring, as far as attention does not hide them
    PP           T / CP h b bytes a chunk (/ TP under sequence parallelism)

A backward pass has twice the products and attention, three times the output (whose logits are made again), and under
sequence parallelism two collectives a layer more; recomputation adds what it repeats. A pipeline takes its slowest
stage's time for all micro-batches M, and the bubble, (PP - 1) / (VPP M) of that (Narayanan et al., arXiv:2104.04473).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.planning.hardware import Gpu, Hardware, peak
from megatron_flowrl.planning.parameters import FP32_BYTES, Stage, itemsize_of, layers_of_stages
from megatron_flowrl.planning.workload import RankLoad

_FORWARD_COLLECTIVES = 4  # gather and scatter around attention, and around the MLP; an all-reduce is two of them


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass: the slowest stage's, of these the tensor-parallel communication, and the pipeline's bubble."""

    stage: float
    communication: float
    bubble: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.stage + self.bubble


@dataclass(frozen=True)
class Machine:
    """Where a layout runs: the kind of GPU, how many are in a node, and ranks that share optimizer states."""

    hardware: Hardware
    gpu: Gpu
    per_node: int
    replicas: int

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second of a GPU in a group of neighbours of so many consecutive ranks."""
        efficiency = self.hardware.efficiency
        if ranks <= self.per_node:
            return self.gpu.nvlink * efficiency.nvlink
        return self.gpu.network * efficiency.network


def pass_time(
    architecture: Architecture, config: Config, machine: Machine, load: RankLoad, *, training: bool, output: bool = True
) -> PassTime:
    """Of a forward pass over a mini-batch; with `training` of a forward and a backward pass.

    output: whether the model has an output layer over the vocabulary, which a critic has not.
    """
    stages = layers_of_stages(architecture, config)
    per_stage = [
        _stage(architecture, config, machine, load, layers, output and stage == len(stages) - 1, training)
        for stage, layers in enumerate(stages)
    ]
    seconds, communication = max(per_stage)
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    busy = machine.hardware.efficiency.busy
    waiting = bubble(len(stages), chunks, load.micro_batches) * seconds
    return PassTime(seconds / busy, communication / busy, waiting / busy)


def bubble(stages: int, chunks: int, micro_batches: float) -> float:
    """How long a stage waits for the others to begin and to end, as a share of its own time (the formula above)."""
    return (stages - 1) / (chunks * micro_batches)


def _stage(
    architecture: Architecture,
    config: Config,
    machine: Machine,
    load: RankLoad,
    layers: int,
    has_output: bool,
    training: bool,
) -> tuple[float, float]:
    """Seconds for all micro-batches, and those of tensor-parallel communication among them."""
    parallel, efficiency, gpu = config.parallel, machine.hardware.efficiency, machine.gpu
    tp, cp, b = parallel.tensor_model_parallel_size, parallel.context_parallel_size, itemsize_of(config)
    h, d = architecture.hidden_size, architecture.head_dim
    queries, keys = architecture.num_attention_heads * d, architecture.num_query_groups * d
    plain = config.precision.dtype
    dtype = "fp8" if config.precision.fp8 else plain
    products = 2 * (h * (queries + 2 * keys) + queries * h + 3 * h * architecture.ffn_hidden_size)
    linear = load.tokens * layers * products / (tp * cp) / (peak(gpu, dtype) * getattr(efficiency, dtype))
    attention = 2 * queries * load.pairs * layers / (tp * cp) / (peak(gpu, plain) * efficiency.attention)
    output = 0.0
    if has_output:
        work = 2 * h * architecture.vocab_size * load.labels / (tp * cp)
        output = work / (peak(gpu, plain) * getattr(efficiency, plain))
    local = load.tokens / cp
    collective = local * h * b * (tp - 1) / tp / machine.bandwidth(tp) * layers
    ring = (cp - 1) * local * 2 * keys / tp * b * layers / machine.bandwidth(tp * cp)
    ring = max(0.0, ring - attention)
    neighbours = 0.0
    if parallel.pipeline_model_parallel_size > 1:
        sent = local * h * b / (tp if parallel.sequence_parallel else 1)
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        world = tp * cp * parallel.pipeline_model_parallel_size * machine.replicas
        neighbours = chunks * sent / machine.bandwidth(world)
    forward = linear + attention + output + _FORWARD_COLLECTIVES * collective + ring + neighbours
    if not training:
        return forward, _FORWARD_COLLECTIVES * collective
    backward_collectives = _FORWARD_COLLECTIVES + (2 if parallel.sequence_parallel else 0)
    backward = 2 * (linear + attention) + 3 * output + backward_collectives * collective + 2 * ring + neighbours
    again, collectives = _recomputed(architecture, config, layers, linear, attention, collective)
    communication = (_FORWARD_COLLECTIVES + backward_collectives) * collective + collectives
    return forward + backward + again, communication


def _recomputed(
    architecture: Architecture, config: Config, layers: int, linear: float, attention: float, collective: float
) -> tuple[float, float]:
    """Seconds of what is computed again, communication included, and that communication."""
    recompute = config.recompute
    if recompute.recompute_granularity is None:
        return 0.0, 0.0
    if recompute.recompute_granularity == "full":
        share = 1.0
        if recompute.recompute_method == "block":
            chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
            share = min(1.0, (recompute.recompute_num_layers or 1) * chunks / layers)
        again = _FORWARD_COLLECTIVES * collective
        return share * (linear + attention + again), share * again
    seconds = attention if "core_attn" in recompute.recompute_modules else 0.0
    if "mlp" not in recompute.recompute_modules:
        return seconds, 0.0
    h, d = architecture.hidden_size, architecture.head_dim
    mlp = 3 * h * architecture.ffn_hidden_size
    others = 2 * h * (architecture.num_attention_heads + architecture.num_query_groups) * d
    return seconds + linear * mlp / (mlp + others) + 2 * collective, 2 * collective


def optimizer_time(config: Config, machine: Machine, stage: Stage) -> tuple[float, float]:
    """Seconds of an optimizer step: communication of gradients and weights, and the update of a rank's states."""
    parallel = config.parallel
    ranks = machine.replicas * parallel.context_parallel_size
    elements = sum(p.elements for chunk in stage for p in chunk)
    weights = sum(p.elements * p.itemsize for chunk in stage for p in chunk)
    sent = (elements * FP32_BYTES + weights) * (ranks - 1) / ranks
    if not config.ddp.use_distributed_optimizer:
        sent = 2 * elements * FP32_BYTES * (ranks - 1) / ranks
    group = parallel.tensor_model_parallel_size * ranks
    exposed = machine.hardware.efficiency.exposed_with_overlap if config.ddp.overlap_grad_reduce else 1.0
    owned = elements / (ranks if config.ddp.use_distributed_optimizer else 1)
    # Gradient read for the norm, read and scaled; weight and two moments read and written; the model's weight written.
    touched = owned * FP32_BYTES * (3 + 2 * 3 + 1)
    rate = machine.gpu.bandwidth * machine.hardware.efficiency.bandwidth
    return exposed * sent / machine.bandwidth(group), touched / rate


__all__ = ["Machine", "PassTime", "bubble", "optimizer_time", "pass_time"]
