"""Seconds that vLLM's servers take for a step's answers.

A decoding step reads the weights once, and the keys and values of every answer under way; it takes the larger of that
and of its products, and a constant. Answers start as others end, so that the longest decide how a rollout ends: each
server is followed from one end of an answer to the next.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.planning.compute import Machine
from megatron_flowrl.planning.hardware import Gpu, peak
from megatron_flowrl.planning.memory import SamplerMemory
from megatron_flowrl.planning.parameters import total_elements


@dataclass(frozen=True)
class Sampling:
    """Of a server: seconds of prefills and of decoding, answers under way on average and at most."""

    prefill: float
    decode: float
    concurrency: float
    most: int

    @property
    def seconds(self) -> float:
        """Both."""
        return self.prefill + self.decode


def sampling(
    architecture: Architecture,
    config: Config,
    machine: Machine,
    memory: SamplerMemory,
    lengths: Sequence[int],
    prompt_tokens: int,
) -> Sampling:
    """A server that is to give answers of such lengths, generation.n to each prompt of so many tokens.

    Raises UserError where the GPU has no arithmetic for rollout.quantization.
    """
    costs, size = machine.hardware.sampler, config.rollout.tensor_parallel_size
    gpu, elements = machine.gpu, total_elements(architecture)
    products = _peak(config, gpu) * costs.prefill * size
    rate = gpu.bandwidth * machine.hardware.efficiency.bandwidth
    fixed = costs.step_milliseconds / 1e3
    if size > 1:
        fixed += 2 * architecture.num_layers * costs.all_reduce_microseconds / 1e6

    def step(under_way: int, tokens: float) -> float:
        read = (memory.weights + tokens * memory.kv_bytes_per_token) / rate
        return max(read, 2 * elements * under_way / products) + fixed

    mean = sum(lengths) / len(lengths)
    room = max(1, int(memory.kv_tokens / (prompt_tokens + mean)))
    most = min(config.rollout.max_num_seqs, room, len(lengths))
    waiting = list(lengths)
    random.Random(0).shuffle(waiting)  # lengths are in order, and answers come in none
    ends: list[int] = []
    now, tokens, decode, places = 0, 0.0, 0.0, 0.0
    while waiting or ends:
        while waiting and len(ends) < most:
            heapq.heappush(ends, now + waiting.pop())
            tokens += prompt_tokens
        steps = ends[0] - now
        under_way = len(ends)
        decode += steps * step(under_way, tokens + under_way * steps / 2)
        places += steps * under_way
        tokens += steps * under_way
        now = ends[0]
        while ends and ends[0] == now:
            heapq.heappop(ends)
        tokens = tokens * len(ends) / under_way  # those that end are as long as the others, on average
    prompts = len(lengths) / config.generation.n  # the prefix cache has a prompt once
    prefill = 2 * elements * prompts * prompt_tokens / products
    return Sampling(prefill, decode, places / max(now, 1), most)


def _peak(config: Config, gpu: Gpu) -> float:
    rollout = config.rollout
    if rollout.quantization is None:
        return peak(gpu, rollout.dtype)
    try:
        return peak(gpu, "fp8")
    except UserError as error:
        raise UserError(
            f"rollout.quantization = {rollout.quantization}: {error}; set rollout.quantization=null, or plan for "
            "another GPU (--gpu)"
        ) from None


__all__ = ["Sampling", "sampling"]
