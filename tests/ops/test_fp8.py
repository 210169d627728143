"""FP8 numbers in plain PyTorch are those of Transformer Engine on an H200, and of a reference in fp64, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_flowrl.ops.fp8 import COLUMN, DTYPES, LARGEST, ROW, SQUARE, Block, Format, quantize, scale_for
from tests.ops.fp8_numbers import RECORDED, digest, numbers


@pytest.fixture(scope="module")
def recorded() -> Any:
    """Digests in the metadata."""
    with safe_open(RECORDED, "pt") as file:
        yield file


def test_what_was_given_is_what_is_given_here(recorded: Any) -> None:
    for step in (0, 1):
        for name, value in numbers(step).items():
            assert digest(value) == recorded.metadata()[f"given.{step}.{name}"]


@pytest.mark.parametrize("form", DTYPES)
def test_bytes_and_inverse_scales_are_transformer_engines(form: Format, recorded: Any) -> None:
    x, said = numbers(0)["x"], recorded.metadata()
    whole = quantize(x, form, None)
    assert digest(whole.data) == said[f"quantised.tensorwise.{form}.data"]
    assert digest(whole.inverse) == said[f"quantised.tensorwise.{form}.inverse"]
    row, column = quantize(x, form, ROW), quantize(x, form, COLUMN)
    assert digest(row.data) == said[f"quantised.block1.{form}.rowwise.data"]
    assert digest(row.inverse.t()) == said[f"quantised.block1.{form}.rowwise.inverse"]
    assert digest(column.data.t()) == said[f"quantised.block1.{form}.columnwise.data"]  # it keeps the transpose
    assert digest(column.inverse) == said[f"quantised.block1.{form}.columnwise.inverse"]
    square = quantize(x, form, SQUARE)
    assert digest(square.data) == said[f"quantised.block2.{form}.rowwise.data"]


def in_fp64(values: Tensor, form: Format, block: tuple[int, int]) -> Tensor:
    """The bytes, by a search among all numbers of the format; every operation in fp64, rounded to fp32 where it is."""
    numbers_of = torch.arange(256, dtype=torch.uint8).view(DTYPES[form]).float().double()
    codes = torch.arange(256)[numbers_of.isfinite()]
    sorted_numbers, order = numbers_of[codes].sort()
    codes = codes[order]
    out = torch.empty(values.shape, dtype=torch.uint8)
    for top in range(0, values.shape[0], block[0]):
        for left in range(0, values.shape[1], block[1]):
            part = values[top : top + block[0], left : left + block[1]].double()
            largest = part.abs().max()
            scale = (LARGEST[form] / largest).float().double() if largest > 0 else torch.tensor(1.0).double()
            if block != tuple(values.shape) and largest > 0:
                scale = 2.0 ** scale.log2().floor()
            scaled = (part * scale).float().double().clamp(-LARGEST[form], LARGEST[form])
            above = torch.searchsorted(sorted_numbers, scaled.contiguous()).clamp(max=len(codes) - 1)
            below = (above - 1).clamp(min=0)
            up, down = sorted_numbers[above] - scaled, scaled - sorted_numbers[below]
            even_above = codes[above] % 2 == 0
            take = (up < down) | ((up == down) & even_above) | (above == 0)
            code = torch.where(take, codes[above], codes[below]).to(torch.uint8)
            zero = torch.where(part.signbit(), 128, 0).to(torch.uint8)
            chosen = code.view(DTYPES[form]).float()
            out[top : top + block[0], left : left + block[1]] = torch.where(chosen == 0, zero, code)
    return out


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("block", [None, ROW, COLUMN, SQUARE])
def test_quantisation_is_that_in_fp64(form: Format, block: Block) -> None:
    draw = torch.Generator().manual_seed(11)
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.randn(200, 300, generator=draw) * torch.logspace(-6, 3, 300)
        values[:, 17] = 0.0
        values[:130, :140] = 0.0  # blocks of zeros alone
        values[150:] = torch.randint(-64, 64, (50, 300), generator=draw) / 16  # ties
        found = quantize(values.to(dtype), form, block)
        expected = in_fp64(values.to(dtype), form, block or (200, 300))
        assert torch.equal(found.data.view(torch.uint8), expected)
        assert found.dequantize().isfinite().all()


def test_zeros_have_a_scale_of_one() -> None:
    zeros = quantize(torch.zeros(3, 5), "e4m3", SQUARE)
    assert zeros.inverse.tolist() == [[1.0]] and zeros.dequantize().tolist() == [[0.0] * 5] * 3


def test_a_margin_leaves_room() -> None:
    magnitudes = torch.tensor([[7.0]])
    assert scale_for(magnitudes, "e4m3", power_of_two=False, margin=2).item() == 16.0


@pytest.mark.parametrize("power", [0, 5, 9])
def test_a_power_of_two_is_rounded_down_however_close_the_next_is(power: int) -> None:
    """A logarithm in fp32 would round up to it, and the largest number would be cut."""
    edge = torch.tensor([[448.0 * 2**power]])
    above = torch.nextafter(edge, torch.tensor(torch.inf))
    assert quantize(edge, "e4m3", ROW).inverse.item() == 2.0**power
    assert quantize(above, "e4m3", ROW).inverse.item() == 2.0 ** (power + 1)
