"""Weights by slice from safetensors or a seed, and what is said of files that will not do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_flowrl.checkpoint.mapping import hugging_face_shapes
from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.checkpoint.sources import RandomSource, SafetensorsSource, WeightSource, open_source
from megatron_flowrl.config import Config, ModelConfig, UserError
from megatron_flowrl.model.architecture import architecture_of
from tests.tiny_models import MODELS

ARCHITECTURE = architecture_of(MODELS["qwen2"])
SHAPES = hugging_face_shapes(ARCHITECTURE)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.norm.weight"  # stands in the second shard


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_single(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / SINGLE)
    return folder


def write_shards(
    folder: Path, tensors: dict[str, Tensor], edit: Callable[[dict[str, Any]], Any] = lambda weight_map: weight_map
) -> Path:
    """Two shards and their index, whose `weight_map` `edit` may spoil."""
    names, half = list(tensors), len(tensors) // 2
    weight_map: dict[str, Any] = {}
    for file, part in zip(SHARDS, (names[:half], names[half:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": edit(weight_map)}))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        SafetensorsSource(folder, ARCHITECTURE)
    return str(caught.value)


def random_slices(count: int) -> list[Slice]:
    draw, slices = random.Random(0), []
    for _ in range(count):
        name = draw.choice(list(SHAPES))
        dim = draw.randrange(len(SHAPES[name]))
        start = draw.randrange(SHAPES[name][dim])
        slices.append(Slice(name, dim, start, draw.randint(start + 1, SHAPES[name][dim])))
    return slices


def whole(source: WeightSource, name: str) -> Tensor:
    return source.read(Slice(name, 0, 0, SHAPES[name][0]))


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_slices_are_parts_of_the_full_tensors(
    write: Callable[..., Path], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source = SafetensorsSource(write(tmp_path, tensors), ARCHITECTURE)
    for piece in random_slices(200):
        expected = tensors[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start)
        assert torch.equal(source.read(piece), expected), piece
    for name in SHAPES:
        assert torch.equal(whole(source, name), tensors[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_files_dtype_is_kept(dtype: torch.dtype, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_single(tmp_path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert whole(SafetensorsSource(tmp_path, ARCHITECTURE), NORM).dtype is dtype


def test_tensors_that_the_model_lacks_are_left_alone(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Such as an output layer beside tied embeddings, or rotary frequencies that old versions saved."""
    write_single(tmp_path, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    SafetensorsSource(tmp_path, ARCHITECTURE)
    SafetensorsSource(tmp_path, architecture_of(MODELS["qwen2_tied"]))


def test_the_index_goes_before_a_single_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """As in transformers' own order of search."""
    write_single(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    source = SafetensorsSource(write_shards(tmp_path, tensors), ARCHITECTURE)
    assert torch.equal(whole(source, NORM), tensors[NORM])


def test_no_weights_at_all(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert str(tmp_path) in message and SINGLE in message and INDEX in message and "model.init=random" in message


def test_a_missing_shard(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, tensors)
    (tmp_path / SHARDS[1]).unlink()
    message = refusal(tmp_path)
    assert str(tmp_path / SHARDS[1]) in message and "does not exist" in message and INDEX in message


@pytest.mark.parametrize("keep", [0, 3, 20, -100])
@pytest.mark.parametrize("write", [write_single, write_shards])
def test_a_truncated_file(write: Callable[..., Path], keep: int, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path, tensors)
    damaged = tmp_path / (SINGLE if write is write_single else SHARDS[1])
    damaged.write_bytes(damaged.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert str(damaged) in message and "cannot be read as safetensors" in message


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n")
    assert str(tmp_path / SINGLE) in refusal(tmp_path)


def test_a_missing_tensor_in_a_single_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_single(tmp_path, {name: tensor for name, tensor in tensors.items() if name != NORM})
    message = refusal(tmp_path)
    assert str(tmp_path) in message and f"{NORM} is missing" in message


def test_a_missing_tensor_in_the_index(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, tensors, lambda m: {name: file for name, file in m.items() if name != NORM})
    assert f"{NORM} is missing" in refusal(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, tensors, lambda m: {**m, NORM: SHARDS[0]})
    message = refusal(tmp_path)
    assert NORM in message and SHARDS[0] in message


@pytest.mark.parametrize("shape", [(47,), (), (48, 1)])
def test_a_wrong_shape(shape: tuple[int, ...], tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_single(tmp_path, {**tensors, NORM: torch.zeros(shape)})
    message = refusal(tmp_path)
    assert str(tmp_path) in message and f"{NORM} in {SINGLE} has shape {shape}, config.json says (48,)" in message


def test_another_models_weights_are_told_in_a_few_lines(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_single(tmp_path, {"something": torch.zeros(2)})
    message = refusal(tmp_path)
    assert "model.embed_tokens.weight is missing" in message and f"and {len(SHAPES) + 1 - 5} more" in message
    assert len(message) < 1000


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", "null", '{"weight_map": null}', '{"weight_map": "x"}'])
def test_a_broken_index(content: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, tensors)
    (tmp_path / INDEX).write_text(content)
    assert f"{tmp_path / INDEX} is not a safetensors index" in refusal(tmp_path)


def test_an_index_that_is_no_text(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, tensors)
    (tmp_path / INDEX).write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path / INDEX} is not a safetensors index" in refusal(tmp_path)


@pytest.mark.parametrize("file", [3, None, ["a"]])
def test_an_index_whose_files_are_no_names(file: Any, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, tensors, lambda m: {**m, NORM: file})
    assert str(tmp_path / INDEX) in refusal(tmp_path)


def test_a_wrong_shape_names_its_shard(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, {**tensors, NORM: torch.zeros(47)})
    assert SHARDS[1] in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64])
def test_quantized_weights_are_refused(dtype: torch.dtype, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_single(tmp_path, {**tensors, name: tensors[name].to(dtype), f"{name}_scale_inv": torch.ones(1, 1)})
    assert name in refusal(tmp_path)


def test_random_tensors_do_not_depend_on_the_order_or_size_of_slices() -> None:
    reference = RandomSource(ARCHITECTURE, seed=1)
    full = {name: whole(reference, name) for name in SHAPES}
    source = RandomSource(ARCHITECTURE, seed=1)
    for piece in random_slices(200):
        expected = full[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start)
        assert torch.equal(source.read(piece), expected), piece


def test_random_tensors_do_not_depend_on_torchs_generator_nor_move_it() -> None:
    name, before = "lm_head.weight", torch.get_rng_state()
    first = whole(RandomSource(ARCHITECTURE, seed=1), name)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(whole(RandomSource(ARCHITECTURE, seed=1), name), first)


def test_seeds_and_names_make_different_tensors() -> None:
    source, other = RandomSource(ARCHITECTURE, seed=1), RandomSource(ARCHITECTURE, seed=2)
    matrices = [name for name, shape in SHAPES.items() if len(shape) == 2]
    assert all(not torch.equal(whole(source, name), whole(other, name)) for name in matrices)
    firsts = [whole(source, name).flatten()[0].item() for name in matrices]
    assert len(set(firsts)) == len(matrices)


def test_random_tensors_are_transformers_own_start() -> None:
    source = RandomSource(ARCHITECTURE, seed=1)
    for name, shape in SHAPES.items():
        tensor = whole(source, name)
        assert tensor.dtype == torch.float32 and tuple(tensor.shape) == shape
        if len(shape) == 2:
            assert tensor.std().item() == pytest.approx(ARCHITECTURE.initializer_range, rel=0.1)
            assert tensor.mean().item() == pytest.approx(0, abs=0.02)
        else:
            assert (tensor == (0.0 if name.endswith(".bias") else 1.0)).all()


def test_the_configuration_picks_the_source(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    random_start = Config(seed=5, model=ModelConfig(path=str(tmp_path), init="random"))
    source = open_source(random_start, ARCHITECTURE)  # needs no weights
    assert torch.equal(whole(source, "lm_head.weight"), whole(RandomSource(ARCHITECTURE, 5), "lm_head.weight"))
    pretrained = Config(model=ModelConfig(path=str(write_single(tmp_path, tensors))))
    assert torch.equal(whole(open_source(pretrained, ARCHITECTURE), NORM), tensors[NORM])
