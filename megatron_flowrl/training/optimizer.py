"""Megatron's optimizer over a trainable model: AdamW on fp32 main weights, its states cut over data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_flowrl.config import Config
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.model.transformer_config import DTYPES


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did; `grad_norm` is the global L2 norm before clipping."""

    updated: bool
    grad_norm: float


class Optimizer:
    """Gradients to zero, then a step: what an update needs, in one place."""

    def __init__(self, model: ParallelModel, config: Config) -> None:
        self._chunks = model.chunks
        self._gathers_lazily = config.ddp.overlap_param_gather
        self.megatron: MegatronOptimizer = get_megatron_optimizer(_optimizer_config(config), model.chunks)
        _allocate_states(self.megatron)

    def zero_grad(self) -> None:
        """Empty the gradient buffers; to be called before every mini-batch."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self) -> StepResult:
        """Clip, update, and see to it that the next forward pass, whichever it is, has the new weights.

        Under `overlap_param_gather` Megatron leaves the gathering to the first forward pass after the gradient buffers
        were emptied: a pass before that, such as one for old log-probs, would see stale weights. So they are emptied
        here.
        """
        updated, grad_norm, _ = self.megatron.step()
        if self._gathers_lazily:
            self.zero_grad()
        return StepResult(bool(updated), float(grad_norm) if grad_norm is not None else 0.0)


def _allocate_states(optimizer: MegatronOptimizer) -> None:
    """Make Adam's states now, as its first step would: a checkpoint is loaded into them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            part.init_state_fn(inner, part.config)
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            inner.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _optimizer_config(config: Config) -> MegatronOptimizerConfig:
    settings, dtype = config.optimizer, config.precision.dtype
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == "bfloat16",
        fp8_recipe=config.precision.fp8_recipe if config.precision.fp8 else None,
        params_dtype=DTYPES[dtype],
        use_distributed_optimizer=config.ddp.use_distributed_optimizer,
        overlap_param_gather=config.ddp.overlap_param_gather,
    )
