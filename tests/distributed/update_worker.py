"""Worker: an update by each objective under each layout of one number of ranks.

torchrun ... -m tests.distributed.update_worker MODELS_FOLDER OUT_FOLDER [LAYOUT ...]
writes OUT_FOLDER/LAYOUT.pt from rank 0: {objective: {"on_policy", "off_policy": metrics, "statistics": {name: values in
the original order}, "gradients": of the off-policy update, {name: full tensor}}}.

The on-policy update is the first after the rollout, with the old pass forced, and with the reference's weights; the
off-policy one has other old, reference and sampler log-probs, the same in every layout.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import Config, check_config, data_parallel_size, load_config
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.model.architecture import Architecture, read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, wrap_for_training
from megatron_flowrl.model.objective import build_objective
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.experience import (
    Experience,
    gather_experience,
    with_old_pass,
    with_reference_pass,
)
from megatron_flowrl.training.optimizer import StepResult
from megatron_flowrl.training.passes import ScoredTokens
from megatron_flowrl.training.update import Updater
from tests.distributed.layout_worker import full_gradients
from tests.distributed.layouts import Layout
from tests.distributed.updates import LAYOUTS, OBJECTIVES
from tests.tiny_models import random_sequences

NUM_SEQUENCES, GROUP = 20, 4


class KeptGradients:
    """An optimizer that keeps the gradients instead of stepping."""

    def __init__(self, model: ParallelModel) -> None:
        self._model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def zero_grad(self) -> None:
        for chunk in self._model.chunks:
            chunk.zero_grad_buffer()

    def step(self, *, skip: bool) -> StepResult:
        assert not skip
        self.gradients = full_gradients(self._model)
        return StepResult(True, 0.0)


def rewards_of(sequences: Sequence[TokenSequence]) -> list[float]:
    """Different ones, but for a group in which all are equal."""
    return [0.7 if i // GROUP == 2 else 0.25 * ((5 * i + sum(sequences[i].prompt)) % 5) for i in range(len(sequences))]


def noise(sequence: TokenSequence, what: int, size: float) -> torch.Tensor:
    """Depends on the sequence alone."""
    seed = hash((what, *sequence.prompt, *sequence.response)) % 2**31
    return size * torch.randn(len(sequence.response), generator=torch.Generator().manual_seed(seed))


def moved(scored: ScoredTokens, sequences: Sequence[TokenSequence], what: int, size: float) -> ScoredTokens:
    noises = torch.cat([noise(sequence, what, size) for sequence in sequences])
    return replace(scored, log_probs=scored.log_probs + noises)


def make_config(path: Path, layout: Layout, objective: str) -> Config:
    settings = (
        {
            "model.path": str(path),
            "model.make_vocab_size_divisible_by": 8,
            "precision.dtype": "float32",
            "data.tokens_per_micro_batch": layout.tokens_per_micro_batch,
            "ddp.use_distributed_optimizer": False,
            "log_prob.temperature": 0.8,
            "log_prob.entropy": True,
        }
        | OBJECTIVES[objective]
        | layout.settings
    )
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    check_config(config)
    return config


def run_layout(layout: Layout, models: Path) -> dict[str, Any]:
    world, path = read_world(), models / layout.model
    platform, architecture = current_platform(world.local_rank), read_architecture(path)
    config = make_config(path, layout, "scaled")
    initialize_process_groups(world, config.parallel, platform, config.seed)
    model = build_parallel_model(architecture, config, platform, log_z=True)
    load_weights(model, open_source(config, architecture))
    model = wrap_for_training(model, config)
    results = {name: run_update(name, layout, model, architecture, path) for name in OBJECTIVES}
    parallel_state.destroy_model_parallel()
    return results


def run_update(
    name: str, layout: Layout, model: ParallelModel, architecture: Architecture, path: Path
) -> dict[str, Any]:
    config = make_config(path, layout, name)
    for module in model.modules:
        for layer in module.log_z.layers if hasattr(module, "log_z") else ():
            if hasattr(layer, "share"):
                layer.share = config.log_z.dropout
    original = random_sequences(NUM_SEQUENCES, seed=5)
    order = list(range(NUM_SEQUENCES))
    if layout.shuffle is not None:
        random.Random(layout.shuffle).shuffle(order)
    rewards = rewards_of(original)
    sequences = [original[i] for i in order]
    experience = gather_experience(
        sequences,
        [rewards[i] for i in order],
        [i // GROUP for i in order],
        config,
        [[-6.0 + float(value) for value in noise(s, 3, 1.0)] for s in sequences],
    )
    rules = packing_rules(config, architecture, data_parallel_size(config.parallel, read_world().size))
    packing = plan([len(s) for s in experience.sequences], rules)
    objective, optimizer = build_objective(config), KeptGradients(model)
    device = current_platform(read_world().local_rank).device
    experience = with_old_pass(experience, model.chunks, packing, config, device, objective.needs)
    experience = with_reference_pass(experience, model.chunks, packing, config, device)
    experience = replace(experience, values=torch.cat([noise(s, 4, 0.5) for s in experience.sequences]))
    updater = Updater(model, optimizer, objective, config, device)  # type: ignore[arg-type]
    on_policy = updater.update(updater.prepare(experience, packing, step=0), 0)
    far = off_policy(experience)
    update = updater.update(updater.prepare(far, packing, step=0), 0)
    place = {tuple(s.prompt + s.response): i for i, s in enumerate(original)}
    back = sorted(
        range(len(update.sequences)),
        key=lambda at: place[tuple((s := experience.sequences[update.sequences[at]]).prompt + s.response)],
    )
    return {
        "on_policy": on_policy.metrics,
        "off_policy": update.metrics,
        "statistics": {key: values[back].clone() for key, values in update.statistics.items()},
        "gradients": optimizer.gradients,
    }


def off_policy(experience: Experience) -> Experience:
    assert experience.old is not None and experience.reference is not None
    return replace(
        experience,
        old=moved(experience.old, experience.sequences, 1, 0.1),
        reference=moved(experience.reference, experience.sequences, 2, 0.3),
    )


def main() -> None:
    models, out, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    world = read_world()
    for layout in LAYOUTS:
        if layout.ranks == world.size and (layout.name in wanted or not wanted):
            result = run_layout(layout, models)
            if world.rank == 0:
                torch.save(result, out / f"{layout.name}.pt")
    destroy_process_groups()


if __name__ == "__main__":
    main()
