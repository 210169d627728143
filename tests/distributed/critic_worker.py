"""Worker: a critic's values, gradients and updates under each layout of one number of ranks, and its checkpoints.

torchrun ... -m tests.distributed.critic_worker MODELS_FOLDER OUT_FOLDER
writes from rank 0 OUT_FOLDER/LAYOUT.pt: {"values" in the original order, "metrics", "gradients": {name: full tensor},
"updates": metrics of three real updates, "skipped": those of one with a NaN, "left_alone": it changed no value};
and on two ranks OUT_FOLDER/checkpoint.pt: what `save_and_resume` returns.
The head begins with values that are not 0, so that the body has gradients.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.checkpoint.reader import resume
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.checkpoint.writer import CheckpointWriter
from megatron_flowrl.config import Config, UserError, check_config, data_parallel_size, load_config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.critic import Critic
from megatron_flowrl.training.experience import Experience, gather_experience
from megatron_flowrl.training.update import Constants
from tests.distributed.layouts import Layout, parallel
from tests.distributed.update_worker import NUM_SEQUENCES, KeptGradients, noise
from tests.tiny_models import random_sequences

_BF16 = {"precision.dtype": "bfloat16"}

LAYOUTS = [
    Layout("one_rank", 1),
    Layout("one_rank_tied", 1, "qwen2_tied"),
    Layout("one_rank_bf16", 1, settings=_BF16),
    Layout("another_order", 1, shuffle=3, tokens_per_micro_batch=100),
    Layout("tp2", 2, settings=parallel(tp=2)),
    Layout("tp2_sp", 2, settings=parallel(tp=2, sp=True)),
    Layout("tp2_sp_bf16", 2, settings=parallel(tp=2, sp=True) | _BF16),
    Layout("pp2", 2, settings=parallel(pp=2)),
    Layout("pp2_tied", 2, "qwen2_tied", settings=parallel(pp=2)),
    Layout("pp2_vpp2", 2, settings=parallel(pp=2, vpp=2)),
    Layout("cp2", 2, settings=parallel(cp=2)),
    Layout("dp2", 2),
    Layout("cp2_tp2_sp", 4, settings=parallel(cp=2, tp=2, sp=True)),
]


def head_weight(hidden_size: int) -> torch.Tensor:
    return 0.3 * torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(1))


class Case:
    """A critic under a layout, and the rollout it is trained on."""

    def __init__(self, layout: Layout, path: Path, *, begin: bool = True) -> None:
        world = read_world()
        self.config = make_config(layout, path)
        self.platform = current_platform(world.local_rank)
        self.architecture = read_architecture(locate_model(path).hugging_face)
        initialize_process_groups(world, self.config.parallel, self.platform, self.config.seed)
        source = open_source(self.config, self.architecture)
        self.critic = Critic(self.architecture, source, self.config, self.platform)
        if begin:
            self.set_head()
            self.critic.schedule.step(1)
        self.sequences = random_sequences(NUM_SEQUENCES, seed=5)
        self.order = list(range(NUM_SEQUENCES))
        if layout.shuffle is not None:
            random.Random(layout.shuffle).shuffle(self.order)
        self.sequences = [self.sequences[i] for i in self.order]
        rules = packing_rules(self.config, self.architecture, data_parallel_size(self.config.parallel, world.size))
        self.packing = plan([len(s) for s in self.sequences], rules)
        self.experience = gather_experience(self.sequences, [0.0] * NUM_SEQUENCES, [0] * NUM_SEQUENCES, self.config)

    def set_head(self) -> None:
        for module in self.critic.model.modules:
            if module.post_process:
                module.output_layer.value.weight.data.copy_(head_weight(self.architecture.hidden_size))
        self.critic.optimizer.megatron.reload_model_params()

    def values(self) -> torch.Tensor:
        return self.critic.values(self.experience, self.packing)

    def experience_with(self, values: torch.Tensor) -> Experience:
        return replace(self.experience, values=values)

    def constants(self, *, nan_at: int | None = None) -> Constants:
        returns = torch.cat([noise(s, 6, 1.0) for s in self.sequences])
        if nan_at is not None:
            returns[nan_at] = float("nan")
        starts = self.experience.offsets[:-1]
        return Constants(self.sequences, self.packing, starts, None, None, None, {}, {"return": returns}, 0)


def make_config(layout: Layout, path: Path) -> Config:
    settings = {
        "model.path": str(path),
        "model.make_vocab_size_divisible_by": 8,
        "precision.dtype": "float32",
        "data.tokens_per_micro_batch": layout.tokens_per_micro_batch,
        "ddp.use_distributed_optimizer": False,
        "objective.name": "ppo",
        "critic.value_clip": 0.5,
        "critic.lr": 0.001,
    } | layout.settings
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    check_config(config)
    return config


def run_layout(layout: Layout, models: Path) -> dict[str, Any]:
    case = Case(layout, models / layout.model)
    critic, values = case.critic, case.values()
    by_sequence = values.split([len(s.response) for s in case.sequences])
    back = sorted(range(NUM_SEQUENCES), key=case.order.__getitem__)
    real, kept = critic.optimizer, KeptGradients(critic.model)
    old = values + torch.cat([noise(s, 5, 0.5) for s in case.sequences])  # some within the clip, some beyond
    critic.optimizer = kept  # type: ignore[assignment]
    metrics = critic.update(case.experience_with(old), case.constants(), 0)
    critic.optimizer = real
    experience, constants = case.experience_with(values), case.constants()
    updates = [critic.update(experience, constants, 0) for _ in range(3)]
    before = case.values()
    skipped = critic.update(experience, case.constants(nan_at=len(values) // 2), 0)
    left_alone = torch.equal(before, case.values())
    parallel_state.destroy_model_parallel()
    return {
        "values": torch.cat([by_sequence[i] for i in back]),
        "metrics": metrics,
        "gradients": kept.gradients,
        "updates": updates,
        "skipped": skipped,
        "left_alone": left_alone,
    }


def save_and_resume(path: Path, out: Path) -> dict[str, Any]:
    """A critic saved at TP2 goes on at PP2, where it began with the weights of a policy's checkpoint with log Z."""
    saving = {"checkpoint.save": str(out), "checkpoint.async_save": False}
    case = Case(Layout("saved", 2, settings=parallel(tp=2) | saving), path)
    policy = build_parallel_model(case.architecture, case.config, case.platform, log_z=True)
    load_weights(policy, open_source(case.config, case.architecture))
    experience, constants = case.experience_with(case.values()), case.constants()
    case.critic.update(experience, constants, 0)
    for name, state in (("policy", TrainingState(policy)), ("critic", case.critic.state)):
        CheckpointWriter(out / name, case.config, path).save(state, 1, {})
    saved = case.values()
    going_on = [case.critic.update(experience, constants, 0) for _ in range(2)]
    parallel_state.destroy_model_parallel()

    settings = parallel(pp=2) | {"ddp.use_distributed_optimizer": True}
    other = Case(Layout("resumed", 2, settings=settings), out / "policy" / "step_00000001", begin=False)
    at_first = other.values()
    other.set_head()
    from_policy = other.values()
    resumed = resume(other.critic.state, out / "critic", other.config)
    result = {
        "zero": bool((at_first == 0).all()),
        "from_policy": from_policy,
        "step": resumed.step if resumed else None,
        "values": (saved, other.values()),
        "updates": (going_on, [other.critic.update(experience, constants, 0) for _ in range(2)]),
        "refusal": _refusal(other, out / "critic" / "step_00000001"),
    }
    parallel_state.destroy_model_parallel()
    return result


def _refusal(case: Case, checkpoint: Path) -> str:
    """What is said to somebody who takes the critic for a policy."""
    policy = build_parallel_model(case.architecture, case.config, case.platform)
    config = replace(case.config, model=replace(case.config.model, path=str(checkpoint)))
    try:
        load_weights(policy, open_source(config, case.architecture))
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = read_world()
    results = {layout.name: run_layout(layout, models) for layout in LAYOUTS if layout.ranks == world.size}
    if world.size == 2:
        results["checkpoint"] = save_and_resume(models / "qwen2", out)
    if world.rank == 0:
        for name, result in results.items():
            torch.save(result, out / f"{name}.pt")
    destroy_process_groups()


if __name__ == "__main__":
    main()
