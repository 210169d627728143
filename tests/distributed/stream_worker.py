"""Worker: the weight stream under one layout after the other, checked against the files it was loaded from.

torchrun ... -m tests.distributed.stream_worker MODELS_FOLDER; every check is an assertion.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.config import load_config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import (
    check_agreement,
    destroy_process_groups,
    initialize_process_groups,
    read_world,
)
from tests.distributed.layouts import parallel

LAYOUTS: list[dict[str, int]] = [
    parallel(tp=2, pp=2),
    parallel(pp=2, vpp=2),
    parallel(tp=4),
    parallel(tp=2, cp=2),
    parallel(pp=4),
    {},
]


def build(path: Path, settings: dict[str, Any]) -> ParallelModel:
    world, platform = read_world(), current_platform(read_world().local_rank)
    overrides = {"model.path": str(path), "model.make_vocab_size_divisible_by": 8, "precision.dtype": "float32"}
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in (overrides | settings).items()])
    initialize_process_groups(world, config.parallel, platform, config.seed)
    architecture = read_architecture(path)
    model = build_parallel_model(architecture, config, platform, log_z=True)
    load_weights(model, open_source(config, architecture))
    return model


def check(model: ParallelModel, expected: dict[str, torch.Tensor]) -> None:
    stream = WeightStream(model)
    metadata = stream.metadata()
    check_agreement("the metadata", metadata)
    assert {info.name: info.shape for info in metadata} == {name: tuple(t.shape) for name, t in expected.items()}
    assert all(info.dtype == torch.float32 for info in metadata)
    check_held(stream, expected)
    check_own_pieces(stream, expected)

    for bucket_bytes in (1, 30_000, 2**28):  # a bucket a parameter, some, one
        streamed = list_of(WeightStream(model, bucket_bytes=bucket_bytes), None)
        assert [name for name, _ in streamed] == [info.name for info in metadata]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed)

    wanted = [name for index, name in enumerate(expected) if index % 3 == 1]
    assert [name for name, _ in list_of(stream, wanted)] == [info.name for info in metadata if info.name in wanted]
    assert list_of(stream, []) == []

    narrow = WeightStream(model, dtype=torch.bfloat16)
    assert all(info.dtype == torch.bfloat16 for info in narrow.metadata())
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in list_of(narrow, None))


def list_of(stream: WeightStream, names: Any) -> list[tuple[str, torch.Tensor]]:
    tensors = []
    for name, tensor in stream.tensors(names):
        assert tensor.is_contiguous()
        tensors.append((name, tensor.clone()))
    return tensors


def check_held(stream: WeightStream, expected: dict[str, torch.Tensor]) -> None:
    """What the ranks of a replica hold covers every element; only what is whole on every rank, more than once."""
    everywhere: list[list[Slice]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, stream.held())
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    counts = {name: torch.zeros(tensor.shape) for name, tensor in expected.items()}
    for piece in (piece for held in everywhere for piece in held):
        counts[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start).add_(1)
    for name, count in counts.items():
        copies = ranks if name.endswith(("norm.weight", "layernorm.weight")) else 1
        assert bool((count == replicas * copies).all()), name


def check_own_pieces(stream: WeightStream, expected: dict[str, torch.Tensor]) -> None:
    """The pieces of a replica's ranks are the tensors, each element once, in the stream's order on every rank."""
    order = [info.name for info in stream.metadata()]
    mine = [(piece, values.clone()) for piece, values in stream.own_pieces()]
    places = [(order.index(piece.name), piece.start) for piece, _ in mine]
    assert places == sorted(places)
    everywhere: list[list[tuple[Slice, torch.Tensor]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    counts = {name: torch.zeros(tensor.shape) for name, tensor in expected.items()}
    for piece, values in (one for pieces in everywhere for one in pieces):
        assert torch.equal(values, piece.of(expected[piece.name]))
        piece.of(counts[piece.name]).add_(1)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    assert all(bool((count == replicas).all()) for count in counts.values())


def main() -> None:
    models = Path(sys.argv[1])
    for name in ("qwen2_tied", "qwen3"):
        expected = load_file(models / name / "model.safetensors")
        for settings in LAYOUTS:
            check(build(models / name, settings), expected)
            parallel_state.destroy_model_parallel()
    destroy_process_groups()


if __name__ == "__main__":
    main()
