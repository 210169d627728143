"""From the configuration to an objective: one registry by name, and whatever the user names by its dotted path."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_flowrl.config import METHODS, Config, UserError
from megatron_flowrl.objectives.batch import Needs, Objective
from megatron_flowrl.objectives.flowrl import FlowRL
from megatron_flowrl.objectives.gflownet_ppo import GFlowNetPPO
from megatron_flowrl.objectives.importance import ImportanceWeight
from megatron_flowrl.objectives.policy_gradient import PolicyGradient


def build_objective(config: Config) -> Objective:
    """The objective that `objective.name` names. Raises UserError where a user's own cannot be had."""
    name = config.objective.name
    return OBJECTIVES[name](config) if name in OBJECTIVES else _users_own(name, config)


def needs_old_pass(needs: Needs, mini_batches: int, config: Config) -> bool:
    """Whether the policy's log-probs before the update have to be computed: not where the only update has them."""
    return (
        needs.old
        or needs.old_entropy
        or mini_batches > 1
        or config.objective.force_old_pass
        or config.sampler_correction.level is not None
    )


def _flowrl(config: Config) -> FlowRL:
    settings = config.flowrl
    return FlowRL(
        beta=settings.beta,
        length_normalization=settings.length_normalization,
        length_exponent=settings.length_exponent,
        reward=settings.reward,
        importance=ImportanceWeight(
            level=settings.importance_level,
            clip=settings.importance_clip,
            maximum=settings.importance_max,
            low=settings.importance_clip_low,
            high=settings.importance_clip_high,
        ),
        log_z=settings.log_z,
        reference=settings.reference,
        residual_limit=_or_infinite(settings.residual_limit),
    )


def _policy_gradient(config: Config) -> PolicyGradient:
    settings = config.policy_gradient
    return PolicyGradient(
        advantage=settings.advantage,
        ratio=settings.ratio,
        aggregation=settings.aggregation,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        clip_dual=_or_infinite(settings.clip_dual),
        kl_coef=settings.kl_coef,
        kl_in_reward=settings.kl_in_reward,
        entropy_coef=settings.entropy_coef,
        entropy_top_share=settings.entropy_top_share,
        discount=settings.discount,
        gae_lambda=settings.gae_lambda,
    )


def _gflownet_ppo(config: Config) -> GFlowNetPPO:
    return GFlowNetPPO(_policy_gradient(config), _flowrl(config), config.policy_gradient.balance_coef)


_BUILDERS: Mapping[str, Callable[[Config], Objective]] = {"flowrl": _flowrl, "gflownet_ppo": _gflownet_ppo}
OBJECTIVES: Mapping[str, Callable[[Config], Objective]] = {
    name: _BUILDERS.get(name, _policy_gradient) for name in METHODS
}


def _users_own(path: str, config: Config) -> Objective:
    module, _, name = path.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"objective.name = {path} is none of {', '.join(OBJECTIVES)}, and cannot be imported: {error}"
        ) from error
    if not callable(factory):
        raise UserError(f"objective.name = {path} is a {type(factory).__name__}; it must be callable: factory(config)")
    objective: Any = factory(config)
    wrong = [
        what
        for what, right in {
            "needs (a Needs)": isinstance(getattr(objective, "needs", None), Needs),
            "statistics (names)": isinstance(getattr(objective, "statistics", None), tuple),
            "prepare(rollout)": callable(getattr(objective, "prepare", None)),
            "a call with a batch": callable(objective),
        }.items()
        if not right
    ]
    if wrong:
        raise UserError(
            f"objective.name = {path} made a {type(objective).__name__}, which has no {', no '.join(wrong)}; "
            "see megatron_flowrl/objectives/batch.py: Objective"
        )
    made: Objective = objective
    return made


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
