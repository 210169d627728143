"""FP8 numbers and their scales as Transformer Engine makes them, in plain PyTorch: a test bed where there is no GPU.

A quantised tensor is round(x * scale) in 8 bits, ties to even, saturated; its inverse scale is kept in fp32. One scale
is of a block of the tensor: all of it, a row of 128 or a column of 128 (activations and gradients), or 128 x 128
(weights). scale = largest number of the format / largest magnitude in the block, or 1 where all are 0; of blocks it is
rounded down to a power of two. Checked bit by bit against Transformer Engine 2.20.2 on an H200 (tests/ops/test_fp8.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["e4m3", "e5m2"]
Block = tuple[int, int] | None
"""Rows and columns that share a scale; None: the whole tensor."""

DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST: dict[Format, float] = {"e4m3": 448.0, "e5m2": 57344.0}
ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)


@dataclass(frozen=True)
class Quantized:
    """data fp8 [M, N]; inverse fp32 [M / rows, N / columns] of the blocks, rounded up, or [1, 1]."""

    data: Tensor
    inverse: Tensor
    block: Block

    def dequantize(self) -> Tensor:
        """The numbers that it stands for, fp32 [M, N]."""
        rows, columns = self.data.shape
        inverse = self.inverse
        if self.block is not None:
            inverse = inverse.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[
                :, :columns
            ]
        return self.data.float() * inverse


def largest_magnitudes(values: Tensor, block: Block) -> Tensor:
    """Of each block of values [M, N]: fp32 [M / rows, N / columns], rounded up, or [1, 1]."""
    magnitudes = values.float().abs()
    if block is None:
        return magnitudes.amax().view(1, 1)
    rows, columns = block
    missing = (-values.shape[1] % columns, -values.shape[0] % rows)
    padded = torch.nn.functional.pad(magnitudes, (0, missing[0], 0, missing[1]))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))


def scale_for(magnitudes: Tensor, form: Format, *, power_of_two: bool, margin: int = 0) -> Tensor:
    """fp32 scales, alike in shape: the largest number of the format (over 2^margin) by the largest magnitude."""
    # PyTorch divides a number by a tensor through the reciprocal, rounded twice: values on an edge fall otherwise then.
    scale = torch.full_like(magnitudes, LARGEST[form]) / magnitudes / 2.0**margin
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    usable = (magnitudes > 0) & magnitudes.isfinite()
    return torch.where(usable, scale.clamp(max=torch.finfo(torch.float32).max), 1.0)


def quantize(values: Tensor, form: Format, block: Block, scale: Tensor | None = None) -> Quantized:
    """values [M, N], any float dtype, in 8 bits. `scale`: instead of the block's own, as of delayed scaling."""
    if scale is None:
        scale = scale_for(largest_magnitudes(values, block), form, power_of_two=block is not None)
    spread = scale
    if block is not None:
        rows, columns = values.shape
        spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    scaled = (values.float() * spread).clamp(-LARGEST[form], LARGEST[form])
    return Quantized(scaled.to(DTYPES[form]), 1.0 / scale, block)


__all__ = [
    "COLUMN",
    "DTYPES",
    "LARGEST",
    "ROW",
    "SQUARE",
    "Block",
    "Format",
    "Quantized",
    "largest_magnitudes",
    "quantize",
    "scale_for",
]
