"""A linear layer whose three products are of FP8 numbers, as Transformer Engine's are, in plain PyTorch.

With x [T, K] the input, w [N, K] the weight and dy [T, N] the gradient of the output:

    y = x w^T    dx = dy w    dw = dy^T x

Both factors of each are quantised by the recipe (`RECIPES`), multiplied exactly, summed in fp32, and rounded to the
model's dtype once. FP8 numbers, and those of a block whose scale is a power of two, fit into bf16 exactly; the scale of
a whole tensor is applied to the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_flowrl.ops.fp8 import (
    COLUMN,
    ROW,
    SQUARE,
    Block,
    Format,
    Quantized,
    largest_magnitudes,
    quantize,
    scale_for,
)
from megatron_flowrl.ops.matmul import Matmul


@dataclass(frozen=True)
class Recipe:
    """Which share a scale: of x and dy where rows are summed (y, dx) and where columns are (dw); of w in y, dx."""

    rows: Block = None
    columns: Block = None
    weight_rows: Block = None
    weight_columns: Block = None


RECIPES = {
    "tensorwise": Recipe(),
    "delayed": Recipe(),
    "blockwise": Recipe(ROW, COLUMN, SQUARE, SQUARE),
    "mxfp8": Recipe((1, 32), (32, 1), (1, 32), (32, 1)),
}


class DelayedScale:
    """The scale of one tensor of a layer, by the largest magnitudes of passes before; 1 until there are any.

    history fp32 [history_len]: its first number gathers those of the present pass.
    """

    def __init__(self, form: Format, margin: int, history_len: int, algo: Literal["most_recent", "max"]) -> None:
        self.scale = torch.ones(1, 1)
        self.history = torch.zeros(history_len)
        self._form, self._margin, self._algo = form, margin, algo

    def take(self, values: Tensor) -> Tensor:
        """The scale for these values [M, N], whose largest magnitude is remembered."""
        torch.maximum(self.history[0], largest_magnitudes(values, None).view(()), out=self.history[0])
        return self.scale

    def update(self, present: Tensor) -> None:
        """A training pass is over, on all ranks; `present` is the largest magnitude on any of them."""
        self.history[0] = present
        amax = self.history.amax() if self._algo == "max" else self.history[0]
        if amax > 0 and amax.isfinite():
            self.scale = scale_for(amax.view(1, 1), self._form, power_of_two=False, margin=self._margin)
        self.history = self.history.roll(-1)
        self.history[0] = 0.0


class _TrainingPasses:
    """Of all models of this process: where one ends, every layer's delayed scales are updated, frozen ones' too."""

    begun = 0


class Fp8Products:
    """How one layer quantises: the recipe, formats (dy is e5m2 in `hybrid`), and what delayed scales remember.

    `group`: ranks whose largest magnitudes delayed scales are made of; None: this one.
    """

    def __init__(
        self,
        recipe: str,
        formats: Literal["e4m3", "hybrid"],
        *,
        margin: int = 0,
        history_len: int = 1,
        algo: Literal["most_recent", "max"] = "most_recent",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._recipe = RECIPES[recipe]
        self._of_gradients: Format = "e5m2" if formats == "hybrid" else "e4m3"
        self._group, self._history_len = group, history_len
        self._trained_in = self._updated_to = _TrainingPasses.begun
        self.delayed: dict[str, DelayedScale] = {}
        if recipe == "delayed":
            for name in ("input", "weight", "gradient"):
                self.delayed[name] = DelayedScale(self._form(name), margin, history_len, algo)

    def _form(self, name: str) -> Format:
        return self._of_gradients if name == "gradient" else "e4m3"

    def begin(self) -> None:
        """A forward pass: scales are updated by the training passes before. All ranks of the group together."""
        if not self.delayed:
            return
        over = _TrainingPasses.begun
        if torch.is_grad_enabled():
            if self._trained_in == _TrainingPasses.begun:  # this layer's second: the first layer of a new pass
                _TrainingPasses.begun += 1
            self._trained_in = _TrainingPasses.begun
            over = _TrainingPasses.begun - 1
        missed, self._updated_to = over - self._updated_to, over
        if missed <= 0:
            return
        largest = torch.stack([scale.history[0] for scale in self.delayed.values()])
        if self._group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, self._group)
        for scale, present in zip(self.delayed.values(), largest, strict=True):
            scale.update(present)
            for _ in range(min(missed - 1, self._history_len)):  # passes in which this layer had no part
                scale.update(torch.zeros(()))

    def quantized(self, name: Literal["input", "weight", "gradient"], values: Tensor) -> Sequence[Quantized]:
        """values [M, N], as factors whose rows, and whose columns, are summed."""
        recipe, form = self._recipe, self._form(name)
        of_weight = name == "weight"
        blocks = (recipe.weight_rows, recipe.weight_columns) if of_weight else (recipe.rows, recipe.columns)
        scale = self.delayed[name].take(values) if self.delayed else None
        by_rows = quantize(values, form, blocks[0], scale)
        return by_rows, by_rows if blocks[0] == blocks[1] else quantize(values, form, blocks[1], scale)


def product(
    left: Quantized, right: Quantized, *, left_transposed: bool = False, right_transposed: bool = False
) -> Tensor:
    """left @ right, fp32."""
    a, b = (one.data.float() if one.block is None else one.dequantize() for one in (left, right))
    a, b = a.t() if left_transposed else a, b.t() if right_transposed else b
    matmul = Matmul(torch.bfloat16, a.device)  # of what are bf16 numbers, whatever they are held in
    out = torch.empty(a.shape[0], b.shape[1], dtype=matmul.result_dtype, device=a.device)
    with matmul.precision():
        matmul.product(a.to(matmul.factor_dtype), b.to(matmul.factor_dtype), out=out)
    for one in (left, right):
        if one.block is None:
            out *= one.inverse
    return out


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        products: Fp8Products,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        total = _gathered(input_, group) if sequence_parallel else input_
        rows, columns = products.quantized("input", total.reshape(-1, total.shape[-1]))
        weight_rows, weight_columns = products.quantized("weight", weight)
        out = product(rows, weight_rows, right_transposed=True)
        if bias is not None:
            out += bias.float()
        ctx.save_for_backward(columns.data, columns.inverse, weight_columns.data, weight_columns.inverse)
        ctx.blocks = columns.block, weight_columns.block
        ctx.products, ctx.group, ctx.sequence_parallel = products, group, sequence_parallel
        ctx.has_bias, ctx.weight_dtype = bias is not None, weight.dtype
        return out.to(input_.dtype).view(*total.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight_columns = (
            Quantized(data, inverse, block)
            for data, inverse, block in zip(ctx.saved_tensors[::2], ctx.saved_tensors[1::2], ctx.blocks, strict=True)
        )
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        by_rows, by_columns = ctx.products.quantized("gradient", flat)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = product(by_rows, weight_columns).to(grad_output.dtype)
            grad_input = grad_input.view(*grad_output.shape[:-1], -1)
            if ctx.sequence_parallel:
                grad_input = _scattered(grad_input, ctx.group)
            elif ctx.group is not None:
                dist.all_reduce(grad_input, group=ctx.group)
        if ctx.needs_input_grad[1]:
            grad_weight = product(by_columns, columns, left_transposed=True).to(ctx.weight_dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_input, grad_weight, grad_bias, None, None, None


def _gathered(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    size = dist.get_world_size(group)
    out = local.new_empty(local.shape[0] * size, *local.shape[1:])
    dist.all_gather_into_tensor(out, local.contiguous(), group=group)
    return out


def _scattered(total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    size = dist.get_world_size(group)
    out = total.new_empty(total.shape[0] // size, *total.shape[1:])
    dist.reduce_scatter_tensor(out, total.contiguous(), group=group)
    return out


def fp8_linear(
    input_: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    products: Fp8Products,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """input_ [..., K] and weight [N, K] in one dtype, bias [N] -> [..., N], with gradients of all three.

    `group`: tensor-parallel ranks among which N is cut: their gradients of the input are summed, or, with
    `sequence_parallel`, gathered input and gradient are cut among them along the first dimension.
    """
    products.begin()
    out: Tensor = _Fp8Linear.apply(input_, weight, bias, products, group, sequence_parallel)
    return out


__all__ = ["RECIPES", "DelayedScale", "Fp8Products", "Recipe", "fp8_linear", "product"]
