"""Hugging Face -> Megatron -> Hugging Face gives every bit back, whatever the layout of each way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_flowrl.checkpoint.manifest import read_manifest
from tests.distributed.layouts import parallel
from tests.distributed.ranks import run_worker
from tests.tiny_models import MODELS, save_model

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "tp2": (2, parallel(tp=2)),
    "pp2": (2, parallel(pp=2)),
    "pp2_vpp2": (2, parallel(pp=2, vpp=2)),
    "dp2": (2, {}),
    "tp2_pp2": (4, parallel(tp=2, pp=2)),
    "tp2_dp2": (4, parallel(tp=2)),
}
# Every layout of import and of export, and every family under both kinds of parallelism.
WAYS = [
    ("one", "one"), ("tp2", "pp2"), ("pp2", "tp2"), ("pp2_vpp2", "dp2"), ("dp2", "pp2_vpp2"),
    ("tp2_pp2", "tp2_dp2"), ("tp2_dp2", "tp2_pp2"),
]  # fmt: skip
CASES = [(model, *way) for model in ("qwen2_tied", "qwen3") for way in WAYS] + [
    (model, "tp2_pp2", "tp2") for model in MODELS if model not in ("qwen2_tied", "qwen3")
]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_in(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def _jobs_in_order(jobs: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Imports before exports; all of one number of ranks in one start."""
    for ranks in (1, 2, 4):
        chosen = [job | {"settings": LAYOUTS[name][1]} for name, job in jobs if LAYOUTS[name][0] == ranks]
        if chosen:
            (folder / "jobs.json").write_text(json.dumps(chosen))
            run_worker("tests.distributed.conversion_worker", [str(folder / "jobs.json")], ranks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SOURCES/MODEL, and for each case OUT/MODEL.IMPORT.EXPORT; bf16 and sharded ones beside them."""
    folder = tmp_path_factory.mktemp("conversion")
    for model in MODELS:
        save_model(model, folder / model)
    (folder / "qwen2_tied" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    bf16 = folder / "bf16"
    shutil.copytree(folder / "qwen2_tied", bf16)
    save_file({n: t.bfloat16() for n, t in tensors_in(bf16).items()}, bf16 / "model.safetensors", {"format": "pt"})
    sharded = folder / "sharded"
    AutoModelForCausalLM.from_pretrained(folder / "qwen3").save_pretrained(sharded, max_shard_size="100KB")
    assert (sharded / "model.safetensors.index.json").is_file()

    imports = {(model, way) for model, way, _ in CASES} | {("bf16", "tp2"), ("sharded", "pp2")}
    exports = [(*case, {}) for case in CASES]
    exports += [("bf16", "tp2", "pp2", {}), ("bf16", "tp2", "tp2_pp2", {"dtype": "float32"})]
    exports += [("sharded", "pp2", way, {"max_shard_bytes": 100_000}) for way in ("tp2", "tp2_pp2", "tp2_dp2", "one")]
    _jobs_in_order(
        [
            (way, {"kind": "import", "source": str(folder / model), "target": str(folder / f"{model}.{way}")})
            for model, way in sorted(imports)
        ],
        folder,
    )
    _jobs_in_order(
        [
            (
                back,
                {
                    "kind": "export",
                    "source": str(folder / f"{model}.{way}"),
                    "target": str(folder / f"{model}.{way}.{back}"),
                    **more,
                },
            )
            for model, way, back, more in exports
        ],
        folder,
    )
    return folder


@pytest.mark.parametrize("model, way, back", CASES)
def test_round_trip_gives_every_bit_back(folders: Path, model: str, way: str, back: str) -> None:
    assert_same_bits(folders / f"{model}.{way}.{back}", tensors_in(folders / model))


def test_every_layout_writes_the_same_files(folders: Path) -> None:
    one = folders / "sharded.pp2.one"
    for back in ("tp2", "tp2_pp2", "tp2_dp2"):
        other = folders / f"sharded.pp2.{back}"
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
        assert all((other / file.name).read_bytes() == file.read_bytes() for file in one.iterdir())


def test_sharded_index(folders: Path) -> None:
    out = folders / "sharded.pp2.tp2"
    assert_same_bits(out, tensors_in(folders / "sharded"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(out).values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - safe_open is no mapping
    assert all((out / file).stat().st_size < 110_000 for file in set(index["weight_map"].values()))


def test_bf16_stays_bf16(folders: Path) -> None:
    assert_same_bits(folders / "bf16.tp2.pp2", tensors_in(folders / "bf16"))
    assert json.loads((folders / "bf16.tp2.pp2" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_of_the_export(folders: Path) -> None:
    out = folders / "bf16.tp2.tp2_pp2"
    assert_same_bits(out, {name: tensor.float() for name, tensor in tensors_in(folders / "bf16").items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("model, way, back", [case for case in CASES if case[1] == "tp2_pp2"])
def test_transformers_gives_the_same_logits(folders: Path, model: str, way: str, back: str) -> None:
    tokens = torch.arange(40)[None] * 7 % 299
    source, exported = (
        AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        for path in (folders / model, folders / f"{model}.{way}.{back}")
    )
    assert torch.equal(source(tokens).logits, exported(tokens).logits)


def test_what_is_beside_the_weights_comes_along(folders: Path) -> None:
    out = folders / "qwen2_tied.tp2.pp2"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folders / "qwen2_tied" / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folders / "qwen2_tied" / "config.json").read_text()
    )


def test_nothing_is_left_behind(folders: Path) -> None:
    assert not [path for path in folders.rglob(".*") if "partial" in path.name or "records" in path.name]


def test_the_manifest_says_where_it_comes_from(folders: Path) -> None:
    manifest = read_manifest(folders / "qwen3.tp2_pp2" / "step_00000000")
    assert manifest.step == 0 and manifest.parts == ["model"]
    assert manifest.layout["tensor_model_parallel_size"] == manifest.layout["pipeline_model_parallel_size"] == 2
    assert manifest.architecture["family"] == "qwen3"
    assert manifest.config["precision"]["dtype"] == "float32"
