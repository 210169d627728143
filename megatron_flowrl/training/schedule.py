"""The learning rate over the steps of a run: Megatron's own scheduler, set up from the configuration."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_flowrl.config import OptimizerConfig

_NEVER = 2**62  # Megatron wants an end of the decay even where nothing decays


def build_schedule(optimizer: MegatronOptimizer, settings: OptimizerConfig) -> OptimizerParamScheduler:
    """Call `step(1)` at the beginning of each step: step s, from 1, then runs at `get_lr` of s.

    So the first step of a warm-up has lr / lr_warmup_iters, not 0, and is not lost.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=settings.lr_decay_iters or _NEVER,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The configuration's values hold after a restart, and the checkpoint's place in the course.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
