"""What is compared: the settings of each method, its reward, how long each task is trained, and what is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

# What an answer is worth: the logarithm of the un-normalised target, or the un-normalised target itself.
Reward = Literal["log_target", "target"]


@dataclass(frozen=True)
class Method:
    """Settings of the configuration over the shared ones; `tasks`: those it is run on."""

    settings: Mapping[str, Any]
    reward: Reward
    tasks: tuple[str, ...] = ("mixture", "conditional", "unequal")


# With beta 1, a log-reward and no reference pi* = exp(beta r) / Z is the target itself.
_TARGET_ITSELF = {"flowrl.beta": 1.0, "flowrl.reference": "none", "log_z.lr": 0.01}

METHODS: Mapping[str, Method] = {
    "flowrl_exact": Method({"objective.preset": "exact", **_TARGET_ITSELF}, "log_target"),
    "flowrl_scaled": Method({"objective.preset": "scaled", **_TARGET_ITSELF}, "log_target"),
    # As published, with pi_ref; here that is the policy before training.
    "flowrl_paper": Method({"objective.preset": "paper"}, "log_target"),
    "flowrl_official": Method({"objective.preset": "official"}, "log_target"),
    # `exact` with nothing of `paper` but its length normalisation and its clip of w.
    "flowrl_paper_raw": Method(
        {"objective.preset": "paper", "flowrl.reward": "raw", **_TARGET_ITSELF}, "log_target", ("unequal",)
    ),
    "grpo": Method({"objective.name": "grpo"}, "target"),
    "ppo": Method(
        {"objective.name": "ppo", "critic.lr": 0.001, "critic.weight_decay": 0.0, "critic.clip_grad": 10.0}, "target"
    ),
    "reinforce_plus_plus": Method({"objective.name": "reinforce_plus_plus"}, "target"),
}


@dataclass(frozen=True)
class Schedule:
    """The same for all methods: how long, and how much is sampled."""

    steps: int
    samples: int = 128  # answers to each prompt at each step
    mini_batches: int = 2  # updates that a step's answers are shared out to


SCHEDULES: Mapping[str, Schedule] = {
    "mixture": Schedule(steps=300),
    "conditional": Schedule(steps=420),
    "unequal": Schedule(steps=300, samples=256),
}


def settings_of(name: str, schedule: Schedule, seed: int) -> dict[str, Any]:
    """The settings of a run: an optimizer that all share, whose rate falls to 0 by a cosine, and the method's own.

    The clip is far above the published 1: a rare answer from a mode that the policy has almost lost is a spike of the
    gradient, and what brings the mode back.
    """
    return {
        "seed": seed,
        "optimizer.lr": 0.001,
        "optimizer.adam_beta2": 0.99,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_grad": 10.0,
        "optimizer.lr_decay_style": "cosine",
        "optimizer.lr_warmup_iters": min(20, schedule.steps - 1),
        "optimizer.lr_decay_iters": schedule.steps,
        "run.steps": schedule.steps,
        **METHODS[name].settings,
    }


@dataclass(frozen=True)
class Outcome:
    """What a policy has become. `course`: (step, KL(target || policy)); `policy`: probabilities, fp64 [P, K]."""

    figures: dict[str, float | int | None]
    course: list[tuple[int, float]]
    policy: Tensor
    skipped_updates: int
    seconds: float
