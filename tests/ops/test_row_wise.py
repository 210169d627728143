"""RMSNorm and SwiGLU by blocks of rows are the textbook ones, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_flowrl.ops import row_wise
from megatron_flowrl.ops.row_wise import rms_norm, swiglu

EPS = 1e-5


def textbook_rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / (hidden.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def textbook_swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def results(function: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradient of every input, for an upstream gradient that differs everywhere."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.fixture(params=[2**17, 100], ids=["one_block", "many_blocks_the_last_ragged"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    monkeypatch.setattr(row_wise, "_BLOCK_ELEMENTS", request.param)
    return (37, 1, 24)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    # Rounded to the dtype first: what is compared is the arithmetic, not the rounding of inputs.
    hidden, weight = (torch.randn(size).to(dtype).double() for size in (shape, shape[-1:]))
    expected = results(textbook_rms_norm, hidden, weight, dtype=torch.float64)
    actual = results(lambda h, w: rms_norm(h, w, EPS), hidden, weight, dtype=dtype)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gate_and_up = torch.randn(shape).to(dtype).double()
    expected = results(textbook_swiglu, gate_and_up, dtype=torch.float64)
    actual = results(swiglu, gate_and_up, dtype=dtype)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_no_rows() -> None:
    hidden = torch.zeros(0, 1, 8, requires_grad=True)
    rms_norm(hidden, torch.ones(8, requires_grad=True), EPS).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
