"""CUDA + NCCL + Transformer Engine, or CPU + gloo: decided once, here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from megatron_flowrl.config import Config, RecomputeConfig, UserError
from megatron_flowrl.platform import cuda_stand_in
from megatron_flowrl.platform.libraries import Libraries, find_libraries


@dataclass(frozen=True)
class Platform:
    """The device of this process and the libraries that drive it."""

    device: torch.device
    backend: str
    libraries: Libraries

    @property
    def is_cuda(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.device.type == "cuda"

    @property
    def gradient_accumulation_fusion(self) -> str | None:
        """What adds weight gradients straight into the fp32 gradient buffer inside Megatron's own linear layers."""
        return "apex" if self.is_cuda and self.libraries.fused_weight_gradient else None

    @property
    def layers(self) -> str:
        """Whose transformer layers are used."""
        return "transformer_engine" if self.is_cuda else "torch"

    def synchronize(self) -> None:
        """Wait until the device has done what it was given; a CPU has."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    @property
    def device_name(self) -> str | None:
        """The GPU's name; None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else None

    def describe(self, fp8: str | None = None) -> str:
        """One line for the start of a run: which implementation of each part is active."""
        lib = self.libraries
        engine = f" {lib.transformer_engine}" if self.is_cuda else ""
        emulated = ", FP8 emulated (its numbers, not its speed)" if fp8 and not self.is_cuda else ""
        adam = f"{lib.fused_adam} FusedAdam" if self.is_cuda and lib.fused_adam else "torch AdamW"
        return (
            f"{self.device.type} ({self.backend}), torch {lib.torch}, Megatron-Core {lib.megatron_core}, "
            f"layers {self.layers}{engine}{emulated}, optimizer {adam}, "
            f"fused weight gradient {self.gradient_accumulation_fusion or 'off'}"
        )


@cache
def current_platform(local_rank: int = 0) -> Platform:
    """Decide the platform of this process and make Megatron-Core usable on it.

    Raises UserError where a GPU is visible but Transformer Engine is not installed, or there is no GPU for this
    local rank.
    """
    if torch.cuda.is_available() and not cuda_stand_in.is_installed():
        libraries = find_libraries()
        if libraries.transformer_engine is None:
            raise UserError(
                "a GPU is visible but Transformer Engine cannot be imported: pip install -e .[gpu] inside NVIDIA's "
                "PyTorch container, or hide the GPU (CUDA_VISIBLE_DEVICES=) to run on the CPU"
            )
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; "
                "start as many processes per node as there are GPUs (torchrun --nproc_per_node)"
            )
        # Before CUDA starts: up to Hopper, Megatron's overlap of tensor-parallel communication needs the order in which
        # kernels are launched to be the order in which they run.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # fp32 means fp32: Transformer Engine asks cuBLAS for TF32 whatever torch says, and containers may switch it on.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
        torch.set_float32_matmul_precision("highest")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return Platform(device, "nccl", libraries)
    cuda_stand_in.install()
    return Platform(torch.device("cpu"), "gloo", find_libraries())


def check_platform(config: Config, platform: Platform) -> None:
    """Refuse settings that this machine cannot honour."""
    if platform.is_cuda:
        check_gpu(config, lambda: torch.cuda.get_device_capability(platform.device))
        return
    problems = list(_fp8_emulation(config)) if config.precision.fp8 is not None else []
    if problems:
        raise UserError(*problems)


def check_gpu(config: Config, capability: Callable[[], tuple[int, int]]) -> None:
    """Refuse settings that a GPU cannot honour; its compute capability is asked for where it matters."""
    if config.precision.dtype == "float32" and config.parallel.context_parallel_size > 1:
        raise UserError(
            "precision.dtype = float32 does not go with parallel.context_parallel_size > 1 on a GPU: Transformer "
            "Engine has no such attention; set precision.dtype=bfloat16 or parallel.context_parallel_size=1"
        )
    if config.precision.fp8 is None:
        return
    needed = {"mxfp8": (10, 0), "blockwise": (9, 0)}.get(config.precision.fp8_recipe, (8, 9))
    have = capability()
    if have < needed:
        raise UserError(
            f"precision.fp8_recipe = {config.precision.fp8_recipe!r} needs a GPU of compute capability "
            f"{needed[0]}.{needed[1]} or newer; this one has {have[0]}.{have[1]}"
        )


def recomputes_linear_layers(recompute: RecomputeConfig) -> bool:
    """Whether products of a layer's weights are among what is computed again."""
    return recompute.recompute_granularity == "full" or (
        recompute.recompute_granularity == "selective" and "mlp" in recompute.recompute_modules
    )


def _fp8_emulation(config: Config) -> Iterator[str]:
    precision = config.precision
    if precision.fp8_param_gather:
        yield (
            "precision.fp8_param_gather = true needs Transformer Engine on a GPU; on this CPU FP8 is emulated, with "
            "weights in bfloat16: set precision.fp8_param_gather=false"
        )
    if precision.fp8_recipe == "delayed" and recomputes_linear_layers(config.recompute):
        yield (
            "precision.fp8_recipe = delayed does not go with recomputed linear layers on this CPU: FP8 is emulated, "
            "and a second pass would move the scales: set recompute.recompute_granularity=null, or another recipe"
        )


__all__ = [
    "Libraries",
    "Platform",
    "check_gpu",
    "check_platform",
    "current_platform",
    "recomputes_linear_layers",
]
