"""Megatron's optimizer over a trainable model: AdamW on fp32 main weights, its states cut over data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import (
    MegatronOptimizer,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from megatron_flowrl.config import Config
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.model.transformer_config import DTYPES

POLICY, LOG_Z = "policy", "log_z"  # parts whose gradient norms are told apart


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did; norms are global L2 norms before clipping, of all gradients and of each part."""

    updated: bool
    grad_norm: float
    grad_norms: Mapping[str, float] = field(default_factory=dict)


class Optimizer:
    """Gradients to zero, then a step: what an update needs, in one place."""

    def __init__(self, model: ParallelModel, config: Config) -> None:
        self._chunks = model.chunks
        self._device = next(model.modules[0].parameters()).device
        self._gathers_lazily = config.ddp.overlap_param_gather
        self._clip_grad = config.optimizer.clip_grad
        settings = _optimizer_config(config)
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            settings, model.chunks, config_overrides=get_standard_config_overrides(settings) | _log_z_overrides(config)
        )
        self._parts = (POLICY, LOG_Z) if model.log_z else (POLICY,)
        _allocate_states(self.megatron)

    def zero_grad(self) -> None:
        """Empty the gradient buffers; to be called before every mini-batch."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, *, skip: bool = False) -> StepResult:
        """Clip, update, and see to it that the next forward pass, whichever it is, has the new weights.

        Nothing is updated where the norm is not finite, or with `skip`, which has to be the same on all ranks.

        Under `overlap_param_gather` Megatron leaves the gathering to the first forward pass after the gradient buffers
        were emptied: a pass before that, such as one for old log-probs, would see stale weights. So they are emptied
        here.
        """
        self.megatron.prepare_grads()
        norms = self._norms()
        norm = math.sqrt(sum(part**2 for part in norms.values()))
        updated = math.isfinite(norm) and not skip
        if updated:
            self._clip(norm)
            self.megatron.step_with_ready_grads()
        if self._gathers_lazily:
            self.zero_grad()
        return StepResult(updated, norm, norms)

    def _clip(self, norm: float) -> None:
        factor = self._clip_grad / (norm + 1e-6)
        if self._clip_grad > 0 and factor < 1:
            parameters = [p for part in _parts_of(self.megatron) for p in part.get_parameters()]
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    @torch.no_grad()
    def _norms(self) -> dict[str, float]:
        """The norm of each part's gradients; which gradients count, and over which ranks, is Megatron's to say."""
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=self._device)
        for optimizer in _parts_of(self.megatron):
            groups = optimizer.optimizer.param_groups if optimizer.optimizer is not None else []
            heads = {id(p.grad) for group in groups if group.get("part") == LOG_Z for p in group["params"]}
            for gradient in _counted_gradients(optimizer):
                squares[self._parts.index(LOG_Z) if id(gradient) in heads else 0] += gradient.double().square().sum()
        dist.all_reduce(squares, group=self.megatron.get_grad_stats_parallel_group())
        return dict(zip(self._parts, squares.sqrt().tolist(), strict=True))


def _counted_gradients(optimizer: Any) -> list[torch.Tensor]:
    """Megatron-Core 0.19 gave the method another name."""
    method = getattr(optimizer, "get_grads_for_grad_norm", None) or optimizer.get_main_grads_for_grad_norm
    gradients: list[torch.Tensor] = method()
    return gradients


def _parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _log_z_overrides(config: Config) -> dict[ParamKey, dict[str, Any]]:
    """A parameter group of its own for the partition function, with its learning rate and weight decay."""
    optimizer, head = config.optimizer, config.log_z
    lr = optimizer.lr if head.lr is None else head.lr
    decay = optimizer.weight_decay if head.weight_decay is None else head.weight_decay
    share = lr / optimizer.lr if optimizer.lr else 0.0
    key = ParamKey(with_name_predicate=ParamWithNamePredicate("log_z", lambda _, name: "log_z." in name))
    return {
        key: {
            "part": LOG_Z,
            "max_lr": lr,
            "min_lr": optimizer.min_lr * share,
            "start_wd": decay,
            "end_wd": decay,
        }
    }


def _allocate_states(optimizer: MegatronOptimizer) -> None:
    """Make Adam's states now, as its first step would: a checkpoint is loaded into them."""
    for part in _parts_of(optimizer):
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
