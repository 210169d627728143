"""Matrix products of tensors in the model's precision, summed *and returned* in fp32.

* CUDA multiplies bf16 factors into an fp32 result itself: `torch.mm(..., out_dtype=torch.float32)`.
* The CPU has no such product. But oneDNN, when told to, rounds fp32 factors to bf16 inside a product and returns
  fp32: for factors that are widened bf16 that is the same product. A CPU without bf16 instructions makes a true fp32
  product of them, which is more exact.

fp32 models get true fp32 products (neither TF32 nor bf16) and fp64 models fp64 products, on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def wide_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `model_dtype` are summed: fp32, or fp64 for fp64."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Matmul:
    """How matrices of `model_dtype` are multiplied on `device`.

    Raises TypeError for a dtype other than bfloat16, float32 and float64, and RuntimeError if this torch cannot do it.
    """

    model_dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if self.model_dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"dtype {self.model_dtype}: must be bfloat16, float32 or float64")
        if not self.adds_in_place and "dtype_out" not in torch.ops.aten.mm.overloads():
            raise RuntimeError(
                f"torch {torch.__version__} has no torch.mm(..., out_dtype=torch.float32), which bf16 on CUDA needs: "
                "install a newer torch, or use an fp32 model"
            )

    @property
    def result_dtype(self) -> torch.dtype:
        return wide_dtype(self.model_dtype)

    @property
    def factor_dtype(self) -> torch.dtype:
        """What both factors must have been cast to."""
        return self.model_dtype if self.device.type == "cuda" else self.result_dtype

    @property
    def adds_in_place(self) -> bool:
        """Whether `add_product` needs no scratch."""
        return self.factor_dtype == self.result_dtype

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Inside, products are as precise as this module says: sets, and restores, a process-wide switch of torch."""
        if self.device.type == "cuda" and self.model_dtype != torch.float32:
            yield  # the switch is about fp32 factors only
            return
        backends: Any = torch.backends
        switch = backends.cuda.matmul if self.device.type == "cuda" else backends.mkldnn.matmul
        factors_are_widened = self.factor_dtype != self.model_dtype
        before = switch.fp32_precision
        switch.fp32_precision = "bf16" if factors_are_widened else "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = before

    def product(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        """out = a @ b"""
        if self.adds_in_place:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.result_dtype, out=out)

    def add_product(self, into: Tensor, a: Tensor, b: Tensor, *, scratch: Tensor | None) -> Tensor:
        """into += a @ b, where `scratch` has the shape and dtype of `into`.

        torch.addmm takes `out_dtype` too, but some versions of torch then refuse to add to anything but bf16.
        """
        if self.adds_in_place:
            return into.addmm_(a, b)
        assert scratch is not None
        return into.add_(self.product(a, b, out=scratch))
