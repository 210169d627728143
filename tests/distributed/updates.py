"""The updates whose losses and gradients must not depend on the layout, and the layouts."""

from __future__ import annotations

from typing import Any

from tests.distributed.layouts import Layout, parallel

OBJECTIVES: dict[str, dict[str, Any]] = {
    "official": {"objective.preset": "official"},  # with dropout, whose masks belong to sequences
    "scaled": {"objective.preset": "scaled", "flowrl.length_exponent": 0.5, "sampler_correction.level": "sequence"},
    "exact_residual_limit": {"objective.preset": "exact", "flowrl.residual_limit": 3.0, "log_z.detach": True},
    "group": {"objective.preset": "exact", "flowrl.log_z": "group", "flowrl.importance_clip": "two_sided"},
    "grpo": {
        "objective.name": "grpo",
        "policy_gradient.kl_coef": 0.1,
        "policy_gradient.entropy_coef": 0.1,
        "policy_gradient.entropy_top_share": 0.6,
        "sampler_correction.level": "token",
    },
    "dapo": {"objective.name": "dapo", "objective.overlong_buffer": 20, "generation.max_tokens": 40},
    "gspo": {"objective.name": "gspo", "policy_gradient.clip_low": 0.3, "policy_gradient.clip_high": 0.3},
    "reinforce_plus_plus": {"objective.name": "reinforce_plus_plus", "policy_gradient.kl_in_reward": 0.1},
    "gflownet_ppo": {"objective.name": "gflownet_ppo", "policy_gradient.gae_lambda": 0.9},
}

LAYOUTS = [
    Layout("one_rank", 1),
    Layout("one_rank_tied", 1, "qwen2_tied"),
    Layout("one_sequence_a_micro_batch", 1, tokens_per_micro_batch=61),
    Layout("another_order", 1, shuffle=3),
    Layout("tp2", 2, settings=parallel(tp=2)),
    Layout("tp2_sp", 2, settings=parallel(tp=2, sp=True)),
    Layout("pp2_tied", 2, "qwen2_tied", settings=parallel(pp=2)),
    Layout("pp2_vpp2", 2, settings=parallel(pp=2, vpp=2)),
    Layout("cp2", 2, settings=parallel(cp=2)),
    Layout("dp2_another_order", 2, shuffle=3, tokens_per_micro_batch=128),
    Layout("cp2_tp2_sp", 4, settings=parallel(cp=2, tp=2, sp=True)),
    Layout("cp2_pp2", 4, settings=parallel(cp=2, pp=2)),
    Layout("cp2_dp2", 4, settings=parallel(cp=2)),
    Layout("tp2_sp_pp2_tied", 4, "qwen2_tied", settings=parallel(tp=2, sp=True, pp=2)),
    Layout("pp2_vpp2_dp2", 4, settings=parallel(pp=2, vpp=2)),
]
