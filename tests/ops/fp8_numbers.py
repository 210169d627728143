"""What was given to Transformer Engine in FP8, and the form in which its answers are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

RECORDED = Path(__file__).with_name("transformer_engine_fp8.safetensors")  # by tests/gpu/record_fp8.py
ROWS, IN, OUT = 256, 384, 256
KEPT = (slice(0, 24), slice(0, 48))  # of each product


def numbers(step: int) -> dict[str, Tensor]:
    """x [ROWS, IN], w [OUT, IN], dy [ROWS, OUT] in bf16, with rows and columns of other sizes."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, IN, generator=draw) * torch.logspace(-2, 1, ROWS).unsqueeze(1)
    w = torch.randn(OUT, IN, generator=draw) * 0.05 * torch.logspace(-1, 1, IN)
    dy = torch.randn(ROWS, OUT, generator=draw) * 1e-3 * torch.logspace(1, -1, OUT)
    return {name: value.to(torch.bfloat16) for name, value in {"x": x, "w": w, "dy": dy}.items()}


def digest(values: Tensor) -> str:
    """Of its bytes."""
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def compact(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of products a corner, in bf16, which they are; digests of bytes, of inverse scales and of what was given."""
    made = {name: value for name, value in found.items() if not name.startswith("quantised")}
    products = {name: value[KEPT].bfloat16().clone() for name, value in made.items()}
    digests = {name: digest(value) for name, value in found.items() if name.startswith("quantised")}
    digests |= {f"given.{step}.{name}": digest(value) for step in (0, 1) for name, value in numbers(step).items()}
    return products, digests
