"""What a plan takes for granted of machines: hardware.yaml, and what a user lays over it."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_flowrl.config import UserError
from megatron_flowrl.observe.flops import peak_flops

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Gpu:
    """A kind of GPU. `device`: its name for observe/flops.py; bytes, bytes a second of one GPU in one direction."""

    device: str
    capability: tuple[int, int]
    memory: PositiveFloat
    bandwidth: PositiveFloat
    nvlink: PositiveFloat
    network: PositiveFloat
    price: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Efficiency:
    """Shares of what the hardware could do at best."""

    float32: Share
    bfloat16: Share
    fp8: Share
    attention: Share
    busy: Share
    nvlink: Share
    network: Share
    bandwidth: Share
    exposed_with_overlap: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class SamplerCosts:
    """vLLM's: times of a decoding step, and memory in bytes."""

    prefill: Share
    step_milliseconds: NonNegativeFloat
    all_reduce_microseconds: NonNegativeFloat
    length_sigma: NonNegativeFloat
    gpu_memory_utilization: Share
    working: NonNegativeFloat
    sleeping: NonNegativeFloat
    packed_buffer: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class TransferCosts:
    """Bytes a second, and the seconds of a step beside its phases."""

    weights: PositiveFloat
    host: PositiveFloat
    disk: PositiveFloat
    step_seconds: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class MemoryCosts:
    """Bytes of FP8 copies for a weight's element, of a rank beside its tensors; the share that the allocator loses."""

    fp8_copies: NonNegativeFloat
    context: NonNegativeFloat
    communicator: NonNegativeFloat
    fragmentation: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Hardware:
    """All of hardware.yaml."""

    gpus: dict[str, Gpu]
    efficiency: Efficiency
    sampler: SamplerCosts
    transfer: TransferCosts
    memory: MemoryCosts

    def gpu(self, name: str) -> Gpu:
        """Raises UserError, with the names there are."""
        if name not in self.gpus:
            raise UserError(
                f"--gpu {name} is not known; give one of {', '.join(self.gpus)}, or describe it (--hardware)"
            )
        return self.gpus[name]


def read_hardware(path: str | os.PathLike[str] | None = None) -> Hardware:
    """hardware.yaml with the file `path` laid over it. Raises UserError for what that should not say."""
    settings: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("hardware.yaml").read_text())
    if path is not None:
        try:
            with open(path, encoding="utf-8") as stream:
                given = yaml.safe_load(stream)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--hardware {os.fspath(path)} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict):
            raise UserError(f"--hardware {os.fspath(path)} is not a mapping such as {{efficiency: {{bfloat16: 0.5}}}}")
        settings = _laid_over(settings, given)
    try:
        return TypeAdapter(Hardware).validate_python(settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise UserError(*(f"--hardware {path}: {problem}" for problem in problems)) from None


def peak(gpu: Gpu, dtype: str) -> float:
    """FLOP/s of observe/flops.py. Raises UserError where the GPU has no such arithmetic, or is not known there."""
    found = peak_flops(gpu.device, dtype)
    if math.isnan(found):
        raise UserError(f"no peak of {dtype} arithmetic is known of {gpu.device!r} (megatron_flowrl/observe/flops.py)")
    return found


def as_settings(hardware: Hardware) -> dict[str, Any]:
    """Nested dicts, as the file has them."""
    return asdict(hardware)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


__all__ = ["Gpu", "Hardware", "as_settings", "peak", "read_hardware"]
