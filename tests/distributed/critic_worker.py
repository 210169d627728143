"""Worker: a critic's values, and the gradients of its update, under each layout of one number of ranks.

torchrun ... -m tests.distributed.critic_worker MODELS_FOLDER OUT_FOLDER
writes OUT_FOLDER/LAYOUT.pt from rank 0: {"values" in the original order, "metrics", "gradients": {name: full tensor}}.
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

from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import check_config, data_parallel_size, load_config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.critic import Critic
from megatron_flowrl.training.experience import gather_experience
from megatron_flowrl.training.plan import packing_rules, plan
from megatron_flowrl.training.update import Constants
from tests.distributed.layouts import Layout, parallel
from tests.distributed.update_worker import NUM_SEQUENCES, KeptGradients, noise
from tests.tiny_models import random_sequences

LAYOUTS = [
    Layout("one_rank", 1),
    Layout("one_rank_tied", 1, "qwen2_tied"),
    Layout("another_order", 1, shuffle=3, tokens_per_micro_batch=100),
    Layout("tp2", 2, settings=parallel(tp=2)),
    Layout("tp2_sp", 2, settings=parallel(tp=2, sp=True)),
    Layout("pp2_tied", 2, "qwen2_tied", settings=parallel(pp=2)),
    Layout("pp2_vpp2", 2, settings=parallel(pp=2, vpp=2)),
    Layout("cp2", 2, settings=parallel(cp=2)),
    Layout("dp2", 2),
    Layout("cp2_tp2_sp", 4, settings=parallel(cp=2, tp=2, sp=True)),
]


def head_weight(hidden_size: int) -> torch.Tensor:
    return 0.3 * torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(1))


def run_layout(layout: Layout, models: Path) -> dict[str, Any]:
    world, path = read_world(), models / layout.model
    platform, architecture = current_platform(world.local_rank), read_architecture(path)
    settings = {
        "model.path": str(path),
        "model.make_vocab_size_divisible_by": 8,
        "precision.dtype": "float32",
        "data.tokens_per_micro_batch": layout.tokens_per_micro_batch,
        "ddp.use_distributed_optimizer": False,
        "objective.name": "ppo",
        "critic.value_clip": 0.5,
    } | layout.settings
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    check_config(config)
    initialize_process_groups(world, config.parallel, platform, config.seed)
    critic = Critic(architecture, open_source(config, architecture), config, platform)
    for module in critic.model.modules:
        if module.post_process:
            module.output_layer.value.weight.data.copy_(head_weight(architecture.hidden_size))
    original = random_sequences(NUM_SEQUENCES, seed=5)
    order = list(range(NUM_SEQUENCES))
    if layout.shuffle is not None:
        random.Random(layout.shuffle).shuffle(order)
    sequences = [original[i] for i in order]
    experience = gather_experience(sequences, [0.0] * NUM_SEQUENCES, [0] * NUM_SEQUENCES, config)
    rules = packing_rules(config, architecture, data_parallel_size(config.parallel, world.size))
    packing = plan([len(s) for s in sequences], rules)
    values = critic.values(experience, packing)
    by_sequence = values.split([len(s.response) for s in sequences])
    back = sorted(range(NUM_SEQUENCES), key=order.__getitem__)
    old = values + torch.cat([noise(s, 5, 0.5) for s in sequences])  # some within the clip, some beyond
    constants = Constants(
        sequences, packing, experience.offsets[:-1], None, None, None, {},
        {"return": torch.cat([noise(s, 6, 1.0) for s in sequences])}, 0,
    )  # fmt: skip
    kept = KeptGradients(critic.model)
    critic.optimizer = kept  # type: ignore[assignment]
    metrics = critic.update(replace(experience, values=old), constants, 0)
    parallel_state.destroy_model_parallel()
    return {
        "values": torch.cat([by_sequence[i] for i in back]),
        "metrics": metrics,
        "gradients": kept.gradients,
    }


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = read_world()
    for layout in LAYOUTS:
        if layout.ranks == world.size:
            result = run_layout(layout, models)
            if world.rank == 0:
                torch.save(result, out / f"{layout.name}.pt")
    destroy_process_groups()


if __name__ == "__main__":
    main()
