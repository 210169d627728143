"""Worker: bytes of weights, gradients, optimizer and activations of every rank of two.

torchrun ... -m tests.planning.measured_worker OUT_FOLDER CASE ...
writes OUT_FOLDER/CASE.RANK.json: {"measured": {kind: bytes}, "planned": {kind: bytes}}.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_flowrl.config import check_config, data_parallel_size, load_config
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.model.architecture import architecture_of
from megatron_flowrl.model.build import build_parallel_model, wrap_for_training
from megatron_flowrl.model.layout import check_layout
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.planning.activations import MicroBatch, stage_activations
from megatron_flowrl.planning.memory import trainable_bytes
from megatron_flowrl.planning.parameters import counted_stages
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import forward_backward, local_batches
from tests.planning.cases import CASES, LENGTHS, PROMPT, TOKENS, Case
from tests.planning.held import Held
from tests.tiny_models import MODELS


def run(case: Case) -> dict[str, dict[str, float]]:
    world = read_world()
    platform, architecture = current_platform(world.local_rank), architecture_of(MODELS[case.model])
    settings = [f"{key}={json.dumps(value)}" for key, value in case.settings.items()]
    config = load_config(None, ["model.path=x", f"data.tokens_per_micro_batch={TOKENS}", *settings])
    check_config(config)
    check_layout(architecture, config)
    initialize_process_groups(world, config.parallel, platform, config.seed)
    model = build_parallel_model(architecture, config, platform)
    for parameter in (p for module in model.modules for p in module.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    model = wrap_for_training(model, config)
    optimizer = Optimizer(model, config)
    parameters = [p for module in model.modules for p in module.parameters()]
    replicas = data_parallel_size(config.parallel, world.size)
    sequences = [TokenSequence((1,) * PROMPT, (2,) * (n - PROMPT)) for n in LENGTHS * replicas * case.micro_batches]
    packing = plan([len(s) for s in sequences], packing_rules(config, architecture, replicas))
    batches = local_batches(sequences, packing, 0, platform.device)
    assert len(batches) == case.micro_batches and len({batch.boundaries[-1] for batch in batches}) == 1
    held = Held(parameters)
    with held.watching():
        forward_backward(model.chunks, batches, config.log_prob, lambda output, _: output.log_probs.sum())
    optimizer.step()
    gc.collect()
    assert held.now == 0, "something is saved for a backward pass that is over"
    stage = parallel_state.get_pipeline_model_parallel_rank()
    cp = config.parallel.context_parallel_size
    planned = trainable_bytes(counted_stages(architecture, config)[stage], config, replicas * cp)
    rows = sum(LENGTHS) - PROMPT * len(LENGTHS)
    pairs = sum(length * length for length in packing.micro_batches[0].padded_lengths)
    shape = MicroBatch(batches[0].boundaries[-1], rows, len(LENGTHS), pairs)
    activations = stage_activations(architecture, config, stage, shape, case.micro_batches, "torch")
    parallel_state.destroy_model_parallel()
    return {
        "measured": {
            "weights": storages(parameters),
            "gradients": storages(buffer.grad_data for chunk in model.chunks for buffer in chunk.buffers),
            "optimizer": optimizer_bytes(optimizer, parameters),
            "activations": held.peak,
        },
        "planned": {
            "weights": planned.weights,
            "gradients": planned.gradients,
            "optimizer": planned.optimizer,
            "activations": activations.total,
        },
    }


def storages(tensors: Iterable[torch.Tensor]) -> float:
    """Bytes of the storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_bytes(optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> float:
    """Moments, and main weights where they are copies."""
    model = {p.untyped_storage().data_ptr() for p in parameters}
    tensors: list[torch.Tensor] = []
    for part in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        groups = part.optimizer.param_groups
        tensors += [p for group in groups for p in group["params"] if p.untyped_storage().data_ptr() not in model]
        tensors += [t for state in part.optimizer.state.values() for t in state.values() if t.numel() > 1]
    return storages(tensors)


def main() -> None:
    out, world = Path(sys.argv[1]), read_world()
    for name in sys.argv[2:]:
        (out / f"{name}.{world.rank}.json").write_text(json.dumps(run(CASES[name])))
    destroy_process_groups()


if __name__ == "__main__":
    main()
