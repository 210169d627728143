"""Bytes of a training rank by kind, and of a vLLM worker.

Exact, up to alignment: weights, gradients, optimizer, partition function, reference. Megatron's DDP puts the parameters
of a chunk and of a dtype into one buffer each of weights (with the distributed optimizer) and of fp32 gradients; every
tensor begins at a multiple of 64 elements, every bucket ends at one of lcm(ranks, 128). The distributed optimizer gives
a rank of R = DP x CP that share it 12 / R bytes for each of their elements (fp32 weight, two moments), 8 / R where the
model is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from megatron_flowrl.checkpoint.stream import BUCKET_BYTES
from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.ops.linear_log_prob import GPU_CHUNK_BYTES
from megatron_flowrl.planning.activations import Activations
from megatron_flowrl.planning.hardware import Hardware
from megatron_flowrl.planning.parameters import FP32_BYTES, Chunk, Parameter, Stage, matrix_elements, total_elements

_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128  # elements; megatron/core/distributed/param_and_grad_buffer.py
_MOMENTS = 2 * FP32_BYTES
_SMALLEST_BUCKET = 40_000_000


@dataclass(frozen=True)
class TrainableBytes:
    """Of parameters that are trained: weights, gradients, optimizer states."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0

    def __add__(self, other: TrainableBytes) -> TrainableBytes:
        return TrainableBytes(
            self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer
        )

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by kind; `resident`: those beside servers on the same GPU, the allocator's losses included.

    `transfer`, a part of `resident`: buffers while weights go to the servers. A server that has to be started again
    gets them while others sample.
    """

    kinds: dict[str, float] = field(default_factory=dict)
    resident: float = 0.0
    host: float = 0.0
    transfer: float = 0.0

    @property
    def total(self) -> float:
        """The most that the rank has at a time."""
        return sum(self.kinds.values())


def trainable_bytes(chunks: Iterable[Chunk], config: Config, ranks: int) -> TrainableBytes:
    """`ranks`: data- times context-parallel, which share optimizer states."""
    total = TrainableBytes()
    for index, chunk in enumerate(chunks):
        for itemsize, parameters in groupby(sorted(chunk, key=lambda p: p.itemsize), key=lambda p: p.itemsize):
            total += _buffer(list(parameters), itemsize, config, ranks, bucketed=index == 0)
    return total


def _buffer(
    parameters: Sequence[Parameter], itemsize: int, config: Config, ranks: int, bucketed: bool
) -> TrainableBytes:
    elements, states = sum(p.elements for p in parameters), _MOMENTS + (FP32_BYTES if itemsize < FP32_BYTES else 0)
    if not config.ddp.use_distributed_optimizer:
        return TrainableBytes(elements * itemsize, elements * FP32_BYTES, elements * states)
    size = None
    if bucketed and config.ddp.overlap_grad_reduce:
        size = config.ddp.bucket_size or max(_SMALLEST_BUCKET, 1_000_000 * ranks)
    end, begin = 0, 0
    for parameter in reversed(parameters):
        end = _padded(end, _ALIGNMENT)
        if parameter.shared and end > begin:
            end = begin = _padded(end, math.lcm(ranks, _BUCKET_ALIGNMENT))
        end += parameter.elements
        if parameter.shared or (size is not None and end - begin >= size):
            end = begin = _padded(end, math.lcm(ranks, _BUCKET_ALIGNMENT))
    end = _padded(end, math.lcm(ranks, _BUCKET_ALIGNMENT))
    return TrainableBytes(end * itemsize, end * FP32_BYTES, elements * states / ranks)


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def frozen_bytes(stage: Stage) -> float:
    """Weights of a forward-only copy, without the partition function."""
    return float(sum(p.elements * p.itemsize for chunk in stage for p in chunk if not _is_log_z(p)))


def rank_memory(
    stage: Stage,
    activations: Activations,
    config: Config,
    hardware: Hardware,
    ranks: int,
    *,
    reference: bool,
    critic: Stage | None = None,
    transfer: float = 0.0,
) -> RankMemory:
    """Of a rank of a pipeline stage at the fullest moment of an update. `transfer`: see `transfer_bytes`."""
    costs = hardware.memory
    policy = trainable_bytes([tuple(p for p in chunk if not _is_log_z(p)) for chunk in stage], config, ranks)
    head = trainable_bytes([tuple(p for p in chunk if _is_log_z(p)) for chunk in stage], config, ranks)
    own_critic = trainable_bytes(critic, config, ranks) if critic is not None else TrainableBytes()
    frozen = frozen_bytes(stage) if reference else 0.0
    on_host = config.reference.placement == "host"
    parallel = config.parallel
    communicators = 1 + sum(
        size > 1
        for size in (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
            ranks,
        )
    )
    has_reference = frozen > 0 and not on_host
    has_output = activations.log_prob > 0
    kinds = {
        "weights": policy.weights,
        "gradients": policy.gradients,
        "optimizer": policy.optimizer,
        "log_z": head.total + activations.log_z,
        "reference": 0.0 if on_host else frozen,
        "critic": own_critic.total,
        "fp8_copies": _fp8_copies([*stage, *(critic or ())], stage if has_reference else (), config, costs.fp8_copies),
        "activations": activations.kept,
        "recomputation": activations.recomputed,
        "log_prob": activations.log_prob + (chunk_bytes(config) if has_output else 0),
        "context": costs.context + costs.communicator * communicators,
    }
    tensors = sum(kinds.values()) - kinds["context"]
    kinds["fragmentation"] = tensors * costs.fragmentation
    stays = ("weights", "gradients", "optimizer", "reference", "critic", "fp8_copies")
    tensors = sum(kinds[kind] for kind in stays) + head.total
    resident = tensors * (1 + costs.fragmentation) + kinds["context"] + transfer
    return RankMemory(kinds, resident, frozen if on_host else 0.0, transfer)


def transfer_bytes(architecture: Architecture, config: Config, hardware: Hardware) -> float:
    """Of a rank on a GPU that it shares with servers, while weights go there.

    The stream's buckets, or the vocabulary's matrix, a rank's part and gathered, where that is more; and the one buffer
    that vLLM's `ipc` engine packs them into, no smaller than the largest tensor.
    """
    tp, itemsize = config.parallel.tensor_model_parallel_size, _rollout_itemsize(config)
    largest = itemsize * architecture.hidden_size * max(architecture.vocab_size, architecture.ffn_hidden_size)
    stream = max(float(BUCKET_BYTES), largest * (1 + (1 / tp if tp > 1 else 0)))
    packed = 0.0 if config.rollout.transfer == "disk" else max(hardware.sampler.packed_buffer, largest)
    return stream + packed


def _fp8_copies(trained: Iterable[Chunk], frozen: Iterable[Chunk], config: Config, copies: float) -> float:
    """What Transformer Engine keeps of weights beside the weights, for FP8 products."""
    if config.precision.fp8 is None:
        return 0.0
    of_trained, of_frozen = (
        sum(p.elements for chunk in chunks for p in chunk if p.matrix) for chunks in (trained, frozen)
    )
    if config.precision.fp8_param_gather:
        return max(0.0, copies - 1) * of_trained
    return copies * of_trained + min(1.0, copies) * of_frozen


def chunk_bytes(config: Config) -> int:
    """Working memory of the log-prob op on a GPU."""
    return config.log_prob.chunk_bytes or GPU_CHUNK_BYTES


@dataclass(frozen=True)
class SamplerMemory:
    """Bytes of a vLLM worker: weights, keys and values that there is room for, and what a token of them takes."""

    weights: float
    kv_cache: float
    kv_bytes_per_token: float
    working: float
    limit: float

    @property
    def kv_tokens(self) -> int:
        """Tokens that a server has room for."""
        return max(0, int(self.kv_cache / self.kv_bytes_per_token))


def sampler_memory(architecture: Architecture, config: Config, hardware: Hardware, gpu_memory: float) -> SamplerMemory:
    """What vLLM takes: `--gpu-memory-utilization` of the GPU, if it can have that; what is left over caches."""
    size, itemsize = config.rollout.tensor_parallel_size, _rollout_itemsize(config)
    weights = total_elements(architecture) * itemsize / size
    if config.rollout.quantization is not None:
        weights -= matrix_elements(architecture) * (itemsize - 1) / size
    groups = max(architecture.num_query_groups / size, 1)
    limit = memory_utilization(config, hardware) * gpu_memory
    room = max(0.0, limit - weights - hardware.sampler.working)
    per_token = 2 * architecture.num_layers * groups * architecture.head_dim * itemsize
    return SamplerMemory(weights, room, per_token, hardware.sampler.working, limit)


def memory_utilization(config: Config, hardware: Hardware) -> float:
    """vLLM's `--gpu-memory-utilization` among rollout.extra_arguments, else its default."""
    arguments = config.rollout.extra_arguments
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--gpu-memory-utilization":
            value = value if equals else arguments[index + 1] if index + 1 < len(arguments) else ""
            try:
                return float(value)
            except ValueError:
                break  # vLLM says what is wrong with it
    return hardware.sampler.gpu_memory_utilization


def _rollout_itemsize(config: Config) -> int:
    return 2 if config.rollout.dtype == "bfloat16" else 4


def _is_log_z(parameter: Parameter) -> bool:
    return parameter.name.startswith("log_z")


__all__ = [
    "RankMemory",
    "SamplerMemory",
    "TrainableBytes",
    "chunk_bytes",
    "memory_utilization",
    "rank_memory",
    "sampler_memory",
    "trainable_bytes",
    "transfer_bytes",
]
