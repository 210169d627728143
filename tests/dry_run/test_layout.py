"""Every rank of a layout without weights: the parts make a whole, and where they do not, it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.checkpoint import mapping
from megatron_flowrl.config import Config, load_config
from megatron_flowrl.dry_run import layout
from megatron_flowrl.dry_run.layout import LayoutError, as_rank, check_ranks, coordinates
from megatron_flowrl.model.architecture import Architecture, architecture_of
from tests.tiny_models import MODELS


def made(model: str, *overrides: str) -> tuple[Config, Architecture]:
    config = load_config(None, [f"model.path={model}", *(f"parallel.{override}" for override in overrides)])
    return config, architecture_of(MODELS[model])


TP, PP, CP, VPP = (
    f"{name}_size=2"
    for name in (
        "tensor_model_parallel",
        "pipeline_model_parallel",
        "context_parallel",
        "virtual_pipeline_model_parallel",
    )
)


@pytest.mark.parametrize(
    ("model", "ranks", "overrides", "parts"),
    [
        ("qwen2", 1, [], 1),
        ("qwen2", 8, [TP, "sequence_parallel=true", PP, CP], 4),
        ("qwen2_tied", 4, [TP, PP], 4),
        ("qwen2_one_group", 4, ["tensor_model_parallel_size=4"], 4),
        ("qwen3", 4, [PP, VPP, CP], 2),
        ("llama", 6, [PP, "num_layers_in_first_pipeline_stage=3", "num_layers_in_last_pipeline_stage=1"], 2),
    ],
)
def test_the_parts_make_a_whole(model: str, ranks: int, overrides: list[str], parts: int) -> None:
    config, architecture = made(model, *overrides)
    found = check_ranks(config, architecture, ranks, log_z=True)
    assert len(found.parameters) == parts
    assert set(found.pieces) == set(mapping.hugging_face_shapes(architecture))
    assert any(name.startswith("log_z.") for name in found.shapes)
    assert all(tensor.startswith(("decoder", "embedding", "output_layer", "log_z")) for tensor in found.shapes)


def test_a_rank_is_where_megatrons_order_puts_it() -> None:
    config, _ = made("qwen2", TP, PP, CP)
    places = []
    for rank in range(16):
        with as_rank(rank, 16, config.parallel):
            places.append(coordinates())
    assert places == [(r % 2, r // 8, r // 2 % 2, r // 4 % 2) for r in range(16)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda piece: (piece[0], piece[1], piece[2] - 1), "is held by no rank"),
        (lambda piece: (piece[0], 0, piece[2]), "is held twice"),
        (lambda piece: (1 - piece[0], *piece[1:]), "is cut along the dimensions"),
    ],
)
def test_a_piece_that_is_wrong_is_named(change: Any, problem: str) -> None:
    config, architecture = made("qwen2", TP)
    found = check_ranks(config, architecture, 2, log_z=False)
    name = "model.layers.1.self_attn.o_proj.weight"
    last = max(found.pieces[name])
    found.pieces[name] = found.pieces[name] - {last} | {change(last)}
    with pytest.raises(LayoutError, match=name) as raised:
        layout._check_pieces(mapping.hugging_face_shapes(architecture), found.pieces)
    assert problem in str(raised.value)


def test_a_mapping_that_gives_two_ranks_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config, architecture = made("qwen2", TP)
    true = mapping.local_tensor

    def wrong(name: str, architecture: Architecture, shard: mapping.Shard) -> mapping.LocalTensor:
        first = mapping.Shard(0, shard.tp_size, shard.padded_vocab)
        return true(name, architecture, first if name.endswith("linear_fc2.weight") else shard)

    monkeypatch.setattr(layout, "local_tensor", wrong)
    with pytest.raises(LayoutError, match=r"mlp\.down_proj\.weight: two ranks hold 0 to 40 of dimension 1"):
        check_ranks(config, architecture, 2, log_z=False)


def test_a_shape_that_the_mapping_does_not_expect_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, architecture = made("qwen2", TP)
    true = mapping.local_tensor
    monkeypatch.setattr(layout, "local_tensor", lambda n, a, s: true(n, a, mapping.Shard(0, 1, s.padded_vocab)))
    with pytest.raises(LayoutError, match=r"has the shape \(.*\), and its slices make"):
        check_ranks(config, architecture, 2, log_z=False)
