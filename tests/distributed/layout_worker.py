"""Worker: loss, log-probs and every parameter's gradient under each layout of one number of ranks.

torchrun ... -m tests.distributed.layout_worker MODELS_FOLDER OUT_FOLDER [NAME ...]
writes OUT_FOLDER/NAME.pt from rank 0:
{"loss", "log_probs", "entropy", "passes_identical", "gradients": {Hugging Face name: full tensor}}.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_flowrl.checkpoint.load import global_parameters, load_weights
from megatron_flowrl.checkpoint.mapping import Shard, hugging_face_shapes, local_tensor
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import Config, check_config, data_parallel_size, load_config
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, wrap_for_training
from megatron_flowrl.model.gpt import OWN_HEADS, TokenLogProbs
from megatron_flowrl.model.layout import check_layout
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.passes import forward_backward, forward_only, gather_tokens, local_batches
from megatron_flowrl.training.reductions import sequence_sums
from tests.distributed.layouts import LAYOUTS, Layout
from tests.tiny_models import random_sequences

NUM_SEQUENCES = 23


def sequences_of(layout: Layout) -> list[TokenSequence]:
    """The sequences of a case; shuffled ones carry the same content in another order."""
    sequences = random_sequences(NUM_SEQUENCES, vocabulary=range(*layout.vocabulary))
    return [sequences[i] for i in order_of(layout)]


def order_of(layout: Layout) -> list[int]:
    order = list(range(NUM_SEQUENCES))
    if layout.shuffle is not None:
        random.Random(layout.shuffle).shuffle(order)
    return order


def sequence_loss(sums: torch.Tensor, entropy_sums: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
    """A squared residual per sequence, as FlowRL's, plus some entropy; `identity` tells sequences apart."""
    residual = 0.01 * sums + 0.3 - 0.05 * identity
    return ((1.0 + identity % 3) * residual**2 + 0.002 * entropy_sums).sum()


def run_layout(layout: Layout, models: Path) -> dict[str, Any] | None:
    world = read_world()
    platform = current_platform(read_world().local_rank)
    settings = {"precision.dtype": "float32"} | layout.settings
    config = load_config(
        None,
        [
            f"model.path={models / layout.model}",
            "model.make_vocab_size_divisible_by=8",
            f"data.tokens_per_micro_batch={layout.tokens_per_micro_batch}",
            "ddp.use_distributed_optimizer=false",
            "log_prob.chunk_bytes=1048576",
            "log_prob.temperature=0.8",
            *(f"{key}={str(value).lower()}" for key, value in settings.items()),
        ],
    )
    check_config(config)
    architecture = read_architecture(config.model.path)
    check_layout(architecture, config)
    initialize_process_groups(world, config.parallel, platform, config.seed)
    model = build_parallel_model(architecture, config, platform)
    load_weights(model, open_source(config, architecture))
    model = wrap_for_training(model, config)

    sequences, order = sequences_of(layout), order_of(layout)
    rules = packing_rules(config, architecture, data_parallel_size(config.parallel, world.size))
    packing = plan([len(s) for s in sequences], rules)
    batches = local_batches(sequences, packing, 0, platform.device)
    result = _run(model, batches, sequences, order, packing.num_sequences(0), config)
    parallel_state.destroy_model_parallel()
    return result if world.rank == 0 else None


def _run(
    model: ParallelModel,
    batches: list[PackedBatch],
    sequences: list[TokenSequence],
    order: list[int],
    num_sequences: int,
    config: Config,
) -> dict[str, Any]:
    cp_group = parallel_state.get_context_parallel_group()
    training_log_probs: list[torch.Tensor] = []

    def loss(output: TokenLogProbs, batch: PackedBatch) -> torch.Tensor:
        assert output.entropy is not None
        training_log_probs.append(output.log_probs.detach().clone())
        identity = torch.tensor([order[i] for i in batch.sequences], dtype=torch.float32)
        sums = sequence_sums(output.log_probs, batch.sequence_of_row, batch.num_sequences, cp_group)
        entropies = sequence_sums(output.entropy, batch.sequence_of_row, batch.num_sequences, cp_group)
        return sequence_loss(sums, entropies, identity) / num_sequences

    outputs = forward_only(model.chunks, batches, config.log_prob, entropy="detached")
    tokens = gather_tokens(sequences, batches, outputs, entropy=True)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    value = forward_backward(model.chunks, batches, config.log_prob, loss, entropy="differentiable")
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    assert len(outputs) == len(training_log_probs)
    identical = all(torch.equal(a.log_probs, b) for a, b in zip(outputs, training_log_probs, strict=True))
    back = sorted(range(len(order)), key=order.__getitem__)
    assert tokens.entropy is not None
    return {
        "loss": value,
        "log_probs": [tokens.of_sequence(i)[0].clone() for i in back],
        "entropy": [tokens.of_sequence(i)[1].clone() for i in back],
        "passes_identical": _everywhere(identical),
        "gradients": full_gradients(model),
    }


def _everywhere(fact: bool) -> bool:
    facts: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return all(facts)


def full_gradients(model: ParallelModel) -> dict[str, torch.Tensor]:
    """Every rank's `main_grad`, put together under Hugging Face names; copies must agree and padding be untouched.

    Tied embeddings have two copies under pipeline parallelism, which is where a missing reduction would show. Heads of
    our own keep their names: each rank of the last stage has a copy.
    """
    architecture = model.architecture
    shard = Shard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        model.modules[0].vocab_size,
    )
    pieces, heads = [], {}
    for module in model.modules:
        for name, parameter in global_parameters(module):
            if name.startswith(OWN_HEADS):
                heads[name] = parameter.main_grad.clone()
                continue
            part, position = local_tensor(name, architecture, shard), 0
            for piece in part.slices:
                length = piece.stop - piece.start
                pieces.append((piece, parameter.main_grad.narrow(part.dim, position, length).clone()))
                position += length
            assert not parameter.main_grad.narrow(part.dim, position, part.padding).any(), f"{name}: padding has grads"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (pieces, heads))
    shapes = hugging_face_shapes(architecture)
    if model.value_head:
        shapes.pop("lm_head.weight", None)
    full = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    own: dict[str, torch.Tensor] = {}
    for rank_pieces, rank_heads in gathered:
        for name, gradient in rank_heads.items():
            assert torch.equal(own.setdefault(name, gradient), gradient), f"ranks disagree on the gradient of {name}"
        for piece, gradient in rank_pieces:
            place = full[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start)
            known = ~place.isnan()
            assert torch.equal(place[known], gradient[known]), f"ranks disagree on the gradient of {piece}"
            place.copy_(gradient)
    assert not any(tensor.isnan().any() for tensor in full.values())
    return full | own


def main() -> None:
    models, out, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    ranks = read_world().size
    for layout in LAYOUTS:
        if layout.ranks == ranks and (layout.name in wanted or not wanted):
            result = run_layout(layout, models)
            if result is not None:
                torch.save(result, out / f"{layout.name}.pt")
    destroy_process_groups()


if __name__ == "__main__":
    main()
