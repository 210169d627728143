"""Worker: ten optimizer steps under variants of communication that must not change a number.

torchrun ... -m tests.distributed.training_worker MODELS_FOLDER OUT_FILE VARIANT.json; the JSON is
{name: {"model": ..., "settings": {...}}}; rank 0 saves {name: {"losses", "grad_norms", "weights", "log_probs",
"reference_log_probs", "buckets"}}. `log_probs` are of a forward-only
pass between a step and the next emptying of the gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_flowrl.checkpoint.load import global_parameters, load_weights
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import check_config, data_parallel_size, load_config
from megatron_flowrl.data.batch import PackedBatch
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model, wrap_for_training
from megatron_flowrl.model.gpt import TokenLogProbs
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import forward_backward, forward_only, gather_tokens, local_batches
from megatron_flowrl.training.reductions import sequence_sums
from megatron_flowrl.training.reference import HostReference
from tests.tiny_models import random_sequences

NUM_SEQUENCES, STEPS = 12, 10


def run_variant(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    world, platform = read_world(), current_platform(read_world().local_rank)
    overrides = {
        "model.path": str(path),
        "model.make_vocab_size_divisible_by": 8,
        "precision.dtype": "float32",
        "data.tokens_per_micro_batch": 128,
        "optimizer.lr": 0.001,
    } | settings
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    check_config(config)
    architecture = read_architecture(path)
    initialize_process_groups(world, config.parallel, platform, config.seed)
    model = build_parallel_model(architecture, config, platform)
    source = open_source(config, architecture)
    load_weights(model, source)
    model = wrap_for_training(model, config)
    optimizer = Optimizer(model, config)
    sequences = random_sequences(NUM_SEQUENCES, seed=5)
    rules = packing_rules(config, architecture, data_parallel_size(config.parallel, world.size))
    packing = plan([len(s) for s in sequences], rules)
    batches = local_batches(sequences, packing, 0, platform.device)
    cp_group = parallel_state.get_context_parallel_group()

    def loss(output: TokenLogProbs, batch: PackedBatch) -> torch.Tensor:
        sums = sequence_sums(output.log_probs, batch.sequence_of_row, batch.num_sequences, cp_group)
        return ((0.02 * sums + 1.0) ** 2).sum() / packing.num_sequences(0)

    reference = HostReference(model, source, platform) if config.reference.placement == "host" else None
    losses, grad_norms, log_probs, reference_log_probs = [], [], [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = forward_backward(model.chunks, batches, config.log_prob, loss)
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        losses.append(value.item())
        result = optimizer.step()
        assert result.updated
        grad_norms.append(result.grad_norm)
        if reference is not None:
            with reference.active() as chunks:
                outputs = forward_only(chunks, batches, config.log_prob)
            reference_log_probs.append(gather_tokens(sequences, batches, outputs, entropy=False).log_probs.clone())
        outputs = forward_only(model.chunks, batches, config.log_prob)
        log_probs.append(gather_tokens(sequences, batches, outputs, entropy=False).log_probs.clone())
    weights = {name: p.detach().clone() for m in model.modules for name, p in global_parameters(m)}
    buckets = sum(len(group.buckets) for chunk in model.chunks for group in chunk.bucket_groups)
    parallel_state.destroy_model_parallel()
    return {
        "losses": losses,
        "grad_norms": grad_norms,
        "log_probs": log_probs,
        "reference_log_probs": reference_log_probs,
        "weights": weights,
        "buckets": buckets,
    }


def main() -> None:
    models, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    results = {name: run_variant(models / v["model"], v["settings"]) for name, v in variants.items()}
    if read_world().rank == 0:
        torch.save(results, out)
    destroy_process_groups()


if __name__ == "__main__":
    main()
