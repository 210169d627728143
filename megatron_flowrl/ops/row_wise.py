"""RMSNorm and SwiGLU for the CPU, a block of rows at a time.

PyTorch composes both from full passes over memory, in bf16 with fp32 copies between them. Blocks stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = 2**17  # half a megabyte of fp32: a handful of such blocks fit into a core's second-level cache


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean(hidden ** 2) + eps) * weight over the last dimension, in fp32, rounded once at the end."""
    return _RMSNorm.apply(hidden, weight, eps)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up for [..., 2 f] with gate in the first half: [..., f] (Shazeer, "GLU variants", 2020)."""
    return _SwiGLU.apply(gate_and_up)


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1]) * torch.get_num_threads()
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        output = torch.empty_like(rows)
        inverse = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=rows.device)
        scale = weight.float()
        for block in _blocks(rows):
            wide = rows[block].float()
            norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            inverse[block] = (norm.square_() / rows.shape[1]).add_(eps).rsqrt_()
            output[block] = (wide * inverse[block]).mul_(scale)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.shape = hidden.shape
        return output.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, inverse = ctx.saved_tensors
        grad_rows = grad_output.reshape(rows.shape)
        grad_hidden = torch.empty_like(rows)
        scale = weight.float()
        grad_scale = torch.zeros_like(scale)
        for block in _blocks(rows):
            normed = rows[block].float() * inverse[block]
            grad = grad_rows[block].float()
            product = grad * normed
            grad_scale += product.sum(dim=0)
            mean = product.mv(scale)[:, None] / rows.shape[1]
            grad_hidden[block] = (grad * scale).addcmul_(normed, mean, value=-1).mul_(inverse[block])
        return grad_hidden.view(ctx.shape), grad_scale.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        rows = gate_and_up.reshape(-1, gate_and_up.shape[-1])
        gate, up = rows.chunk(2, dim=1)
        output = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        for block in _blocks(rows):
            torch.mul(F.silu(gate[block]), up[block], out=output[block])
        ctx.save_for_backward(rows)
        ctx.shape = gate_and_up.shape
        return output.view(*gate_and_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        gate, up = rows.chunk(2, dim=1)
        grad_rows = torch.empty_like(rows)
        grad_gate, grad_up = grad_rows.chunk(2, dim=1)
        grad_output = grad_output.reshape(up.shape)
        for block in _blocks(rows):
            grad = grad_output[block]
            torch.mul(grad, F.silu(gate[block]), out=grad_up[block])
            grad_gate[block] = torch.ops.aten.silu_backward(grad * up[block], gate[block])
        return grad_rows.view(ctx.shape)
