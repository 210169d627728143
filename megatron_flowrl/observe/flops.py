"""What a step computes, what the device could, and the memory that it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import psutil  # type: ignore[import-untyped]
import torch

from megatron_flowrl.config import UserError
from megatron_flowrl.platform import cuda_stand_in


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """A dense decoder-only transformer. `ffn` is the width inside the MLP, which has three matrices where `gated`."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int | None = None  # None: hidden / heads
    gated: bool = True


def forward_flops(size: TransformerSize, lengths: Sequence[int], logits: int | None = None) -> float:
    """Floating-point operations of one forward pass over packed sequences of `lengths` tokens; a multiply-add is two.

    With h = hidden, a = heads x head_dim, k = kv_heads x head_dim, T = sum of lengths:

        T x layers x 2 (h (a + 2 k) + a h + m h ffn)    projections, MLP; m = 3 where gated, else 2
        + layers x 4 a x sum of L^2 / 2                 attention: scores and their product with the values, causal
        + logits x 2 h vocab                            the output layer

    `logits`: tokens that the output layer is applied to; None: all. Norms, activations, rotary embeddings and softmax
    are left out, as they are by convention (Narayanan et al., arXiv:2104.04473; Chowdhery et al., arXiv:2204.02311);
    unlike there, attention is counted sequence by sequence and only below the diagonal, which is what is computed.
    """
    head_dim = size.hidden // size.heads if size.head_dim is None else size.head_dim
    queries, keys = size.heads * head_dim, size.kv_heads * head_dim
    tokens = float(sum(lengths))
    mlp = (3 if size.gated else 2) * size.hidden * size.ffn
    linear = 2 * (size.hidden * (queries + 2 * keys) + queries * size.hidden + mlp)
    attention = 4 * queries * sum(length * length for length in lengths) / 2
    output = 2 * size.hidden * size.vocab * (tokens if logits is None else logits)
    return size.layers * (tokens * linear + attention) + output


def training_flops(size: TransformerSize, lengths: Sequence[int], logits: int | None = None) -> float:
    """Forward and backward: three times forward, since every product has two gradients of its own cost.

    Recomputed activations are not counted: MFU is of the model's operations, whatever else the hardware does.
    """
    return 3 * forward_flops(size, lengths, logits)


# Dense teraFLOP/s from NVIDIA's data sheets, without sparsity: float32 outside the tensor cores (this program switches
# TF32 off), bfloat16 and float16, FP8. The first entry of which every word is in the device's name.
_NVIDIA: tuple[tuple[str, float, float, float], ...] = (
    ("GB300", 80, 2500, 5000),
    ("GB200", 80, 2500, 5000),
    ("B300", 75, 2250, 4500),
    ("B200", 75, 2250, 4500),
    ("GH200", 67, 989.5, 1979),
    ("H200 NVL", 60, 835.5, 1671),
    ("H200", 67, 989.5, 1979),
    ("H100 NVL", 60, 835.5, 1671),
    ("H100 PCIe", 51, 756, 1513),
    ("H100", 67, 989.5, 1979),
    ("H20", 44, 148, 296),
    ("H800 PCIe", 51, 756, 1513),
    ("H800", 67, 989.5, 1979),
    ("A100", 19.5, 312, math.nan),
    ("A800", 19.5, 312, math.nan),
    ("A40", 37.4, 149.7, math.nan),
    ("A30", 10.3, 165, math.nan),
    ("A10", 31.2, 125, math.nan),
    ("L40S", 91.6, 362, 733),
    ("L40", 90.5, 181, 362),
    ("L4", 30.3, 121, 242.5),
)
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 1, "fp8": 2}


def peak_flops(device_name: str | None, dtype: str) -> float:
    """FLOP/s that a device can do at best in "float32", "bfloat16", "float16" or "fp8".

    `device_name` as torch.cuda.get_device_name gives it; NaN for a device that is not in the table, for a slice of one
    (MIG), and where it has no such arithmetic: then the share that is used is not known, unless tracking.peak_tflops
    says. None: this CPU, by the best of a few matrix products with the threads that torch has, in less than a second.
    """
    if dtype not in _DTYPES:
        raise UserError(f"no peak is known of dtype {dtype!r}; there are {', '.join(_DTYPES)}")
    if device_name is None:
        return math.nan if dtype == "fp8" else _measured_peak(dtype)
    words = set(device_name.replace("-", " ").split())
    for name, *teraflops in _NVIDIA:
        if words >= set(name.split()) and "MIG" not in words:
            return teraflops[_DTYPES[dtype]] * 1e12
    return math.nan


@cache
def _measured_peak(dtype: str, seconds: float = 0.5) -> float:
    """Products of growing matrices until the time is over: small ones do not fill a fast machine."""
    best, size, deadline = 0.0, 128, time.perf_counter() + seconds
    kind = getattr(torch, dtype)
    with torch.inference_mode():
        while True:
            left, right = (torch.full((size, size), 0.5, dtype=kind) for _ in range(2))
            torch.mm(left, right)  # the first one of a size prepares
            for _ in range(3):
                begin = time.perf_counter()
                torch.mm(left, right)
                end = time.perf_counter()
                best = max(best, 2 * size**3 / (end - begin))
                if end > deadline:
                    return best
            # Four products of the next size, each eight times as long, have to fit before the deadline.
            if size < 2048 and end + 8 * 4 * (end - begin) < deadline:
                size *= 2


@dataclass(frozen=True)
class Memory:
    """Bytes of this process."""

    resident: int
    """Main memory."""

    accelerator_peak: int | None
    """The most that torch has had allocated on the GPU since the last call; None on a CPU."""


def memory() -> Memory:
    """What this process takes. Begins a new peak on the accelerator."""
    peak = None
    if torch.cuda.is_available() and not cuda_stand_in.is_installed():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return Memory(psutil.Process().memory_info().rss, peak)


__all__ = ["Memory", "TransformerSize", "forward_flops", "memory", "peak_flops", "training_flops"]
