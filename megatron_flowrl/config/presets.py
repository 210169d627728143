"""Settings that another setting gives their defaults to: a preset of FlowRL, the name of a method."""

from collections.abc import Mapping
from typing import Any

# FlowRL: each preset in full, so that one can be read by itself. `scaled` is what the schema's own defaults say.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "flowrl.beta": 15.0,
        "flowrl.length_normalization": "log_probs",
        "flowrl.reward": "group_norm",
        "flowrl.importance_clip": "two_sided",
        "log_z.dropout": 0.0,
        "log_z.prompt_tokens": "all",
    },
    "official": {
        "flowrl.beta": 15.0,
        "flowrl.length_normalization": "log_probs",
        "flowrl.reward": "group_norm",
        "flowrl.importance_clip": "max",
        "log_z.dropout": 0.1,
        "log_z.prompt_tokens": "drop_last",
    },
    "exact": {
        "flowrl.beta": 8.0,
        "flowrl.length_normalization": "none",
        "flowrl.reward": "raw",
        "flowrl.importance_clip": "max",
        "log_z.dropout": 0.0,
        "log_z.prompt_tokens": "all",
    },
    "scaled": {
        "flowrl.beta": 8.0,
        "flowrl.length_normalization": "residual",
        "flowrl.reward": "raw",
        "flowrl.importance_clip": "max",
        "log_z.dropout": 0.0,
        "log_z.prompt_tokens": "all",
    },
}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "flowrl": {},
    "grpo": {
        "policy_gradient.advantage": "group_norm",
        "policy_gradient.aggregation": "sequence_mean",
        "policy_gradient.kl_coef": 0.001,
    },
    "dapo": {
        "policy_gradient.advantage": "group_norm",
        "policy_gradient.aggregation": "token_mean",
        "policy_gradient.clip_high": 0.28,
        "objective.degenerate_groups": "drop",
    },
    "gspo": {
        "policy_gradient.advantage": "group_norm",
        "policy_gradient.ratio": "sequence",
        "policy_gradient.aggregation": "sequence_mean",
        "policy_gradient.clip_low": 3e-4,
        "policy_gradient.clip_high": 4e-4,
    },
    "rloo": {
        "policy_gradient.advantage": "leave_one_out",
        "policy_gradient.aggregation": "sequence_mean",
    },
    "reinforce_plus_plus": {
        "policy_gradient.advantage": "reinforce_plus_plus",
        "policy_gradient.kl_in_reward": 0.001,
    },
    "ppo": {"policy_gradient.advantage": "gae", "policy_gradient.kl_in_reward": 0.001},
    "gflownet_ppo": {"policy_gradient.advantage": "gae", "flowrl.importance_level": "none"},
}


def defaults_of(preset: str, name: str) -> dict[str, Any]:
    """What a preset of FlowRL and a method's name set, where nothing else does; the name comes before the preset."""
    return {**PRESETS[preset], **METHODS.get(name, {})}
