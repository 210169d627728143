"""Training saved under one layout goes on under others; a killed run ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_flowrl.checkpoint.manifest import problem_with, read_manifest
from megatron_flowrl.platform import Platform
from tests.distributed.layouts import parallel
from tests.distributed.ranks import REPOSITORY, run_module, run_worker
from tests.tiny_models import VOCABULARY, save_model

pytestmark = pytest.mark.distributed

_OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "ddp.bucket_size": 20000}
_BF16 = {"precision.dtype": "bfloat16"}
_NO_CLIP = {"optimizer.clip_grad": 0.0}  # with it, overlap adds the norm up in another order
_SYNCHRONOUS = {"checkpoint.async_save": False}
SAVED_AT, UNTIL = 3, 8

# ranks -> {name: settings}: what a checkpoint of TP2 is read under.
OTHERS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": parallel(tp=2),
        "pp2_vpp2": parallel(pp=2, vpp=2),
        "dp2": {},
        "dp2_replicated": {"ddp.use_distributed_optimizer": False},
        "cp2": parallel(cp=2),
    },
    4: {"tp2_sp_pp2": parallel(tp=2, sp=True, pp=2), "pp2_dp2_overlap": parallel(pp=2) | _OVERLAP},
}
NAMES = [name for layouts in OTHERS.values() for name in layouts]


def _start(runs: list[dict[str, Any]], ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    (folder / "runs.json").write_text(json.dumps(runs))
    arguments = [str(folder / "runs.json"), str(folder / "results.pt")]
    run_worker("tests.distributed.checkpoint_worker", arguments, ranks)
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """`saved` at TP2; each other layout reads it, saves again at once and goes on. bf16 and asynchronous ones too."""
    model = str(save_model("qwen2_tied", folder / "model"))

    def run(name: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"name": name, "model": model, "until": UNTIL, "settings": settings, "log_z": True, **more}

    def saving(name: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        return run(name, settings, save=str(folder / name), save_steps=[SAVED_AT], **more)

    def reading(name: str, settings: dict[str, Any], root: str = "saved") -> dict[str, Any]:
        return run(name, settings, resume=str(folder / root), save=str(folder / f"{name}.again"), save_steps=[-1])

    results = _start(
        [
            saving("saved", parallel(tp=2) | _SYNCHRONOUS),
            saving("saved_dp2", _SYNCHRONOUS | _NO_CLIP),
            saving("async", _OVERLAP | _NO_CLIP, hold_writers_until=SAVED_AT + 3),
            saving("saved_bf16", _BF16 | parallel(pp=2)),
            reading("bf16_same", _BF16 | parallel(pp=2), "saved_bf16"),
            reading("bf16_tp2", _BF16 | parallel(tp=2), "saved_bf16"),
            reading("bf16_replicated", _BF16 | {"ddp.use_distributed_optimizer": False}, "saved_bf16"),
        ],
        2,
        folder,
    )
    for ranks, layouts in OTHERS.items():
        results |= _start([reading(name, settings) for name, settings in layouts.items()], ranks, folder)
    return results


@pytest.fixture
def stored(one_rank_platform: Platform) -> Iterator[Any]:
    """Path of a checkpoint -> all its tensors, whole, padding of the vocabulary cut off."""

    def load(path: Path) -> dict[str, torch.Tensor]:
        state = dist_checkpointing.load_plain_tensors(str(path))
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        return {
            name: value[:VOCABULARY] if name.startswith(("embedding.", "output_layer.")) else value
            for name, value in tensors.items()
        }

    yield load


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("layout", NAMES)
def test_weights_read_under_another_layout_are_the_same_bits(runs: Any, layout: str) -> None:
    assert runs[layout]["resumed"] == (SAVED_AT, {"consumed_sequences": 27})
    assert_same(runs[layout]["weights_at_start"], runs["tp2"]["weights_at_start"])


@pytest.mark.parametrize("layout", NAMES)
def test_everything_saved_again_at_once_is_the_same_bits(runs: Any, folder: Path, stored: Any, layout: str) -> None:
    """Adam's states and log Z included."""
    first = stored(folder / "saved" / "step_00000003")
    again = stored(folder / f"{layout}.again" / "step_00000003")
    assert any(name.startswith("optimizer.exp_avg_sq.") and bool(value.any()) for name, value in first.items())
    assert {name.split(".")[1] for name in first if name.startswith("optimizer.")} == {"exp_avg", "exp_avg_sq"}
    assert sum(name.startswith("log_z.") for name in first) == 10
    assert_same(first, again)


@pytest.mark.parametrize("layout", NAMES)
def test_five_further_steps_have_the_same_losses(runs: Any, layout: str) -> None:
    expected = {step: loss for step, loss in runs["saved"]["losses"].items() if step > SAVED_AT}
    assert runs[layout]["losses"].keys() == expected.keys() and len(expected) == 5
    torch.testing.assert_close(runs[layout]["losses"], expected, rtol=1e-6, atol=0.0)
    assert runs[layout]["lr"] == runs["saved"]["lr"]


def test_the_same_layout_goes_on_bit_for_bit(runs: Any) -> None:
    for before, after in (("saved", "tp2"), ("saved_bf16", "bf16_same")):
        expected = {step: loss for step, loss in runs[before]["losses"].items() if step > SAVED_AT}
        assert runs[after]["losses"] == expected
        assert_same(runs[after]["weights"], runs[before]["weights"])


@pytest.mark.parametrize("layout", ["bf16_tp2", "bf16_replicated"])
def test_bf16_main_weights_reshard_too(runs: Any, folder: Path, stored: Any, layout: str) -> None:
    first = stored(folder / "saved_bf16" / "step_00000003")
    main = first["optimizer.main.decoder.layers.mlp.linear_fc1.weight"]
    assert main.dtype == torch.float32 and not torch.equal(main, main.bfloat16().float())
    assert_same(first, stored(folder / f"{layout}.again" / "step_00000003"))
    expected = {step: loss for step, loss in runs["saved_bf16"]["losses"].items() if step > SAVED_AT}
    torch.testing.assert_close(runs[layout]["losses"], expected, rtol=5e-3, atol=0.0)


def test_a_save_written_three_steps_later_is_the_synchronous_one(runs: Any, folder: Path, stored: Any) -> None:
    """Though the weights that updates overlap with were still to be gathered when it was taken."""
    assert runs["async"]["last_saved"] == SAVED_AT
    assert runs["async"]["losses"] == runs["saved_dp2"]["losses"]
    assert_same(stored(folder / "async" / "step_00000003"), stored(folder / "saved_dp2" / "step_00000003"))


def test_the_weights_of_a_run_are_exported_without_its_own_heads(runs: Any, folder: Path, tmp_path: Path) -> None:
    """Trained under TP2 with Adam's states and log Z, exported in one process."""
    tool = [sys.executable, "tools/megatron_to_hf.py", str(folder / "saved"), str(tmp_path / "out")]
    done = subprocess.run(
        tool, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), runs["tp2"]["weights_at_start"])


def test_checksums_are_those_of_the_files(runs: Any, folder: Path) -> None:
    checkpoint = folder / "saved" / "step_00000003"
    manifest = read_manifest(checkpoint)
    assert manifest.parts == ["model", "log_z", "optimizer", "schedule"]
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "hugging_face/config.json"} < manifest.files.keys()
    assert not any(problem_with(checkpoint, name, record) for name, record in manifest.files.items())
    on_disk = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert on_disk == manifest.files.keys() | {"manifest.json"}


def test_killed_and_started_again_ends_in_the_same_bits(folder: Path) -> None:
    """Ten steps straight, and five, kill -9, five."""
    model, root = str(save_model("qwen2", folder / "untied")), str(folder / "killed")
    run = {"name": "run", "model": model, "settings": {"ddp.use_distributed_optimizer": True}}
    straight = _start([run | {"until": 10}], 2, folder)["run"]
    killed = run | {"until": 10, "resume": root, "save": root, "save_steps": [2, 5]}
    (folder / "runs.json").write_text(json.dumps([killed | {"kill_at": 6, "settings": _SYNCHRONOUS}]))
    done = run_module("tests.distributed.checkpoint_worker", [str(folder / "runs.json"), "nowhere"], 2)
    assert done.returncode != 0 and "SIGKILL" in done.stdout
    again = _start([killed], 2, folder)["run"]
    assert again["resumed"] == (5, {"consumed_sequences": 45})
    assert again["losses"] == {step: loss for step, loss in straight["losses"].items() if step > 5}
    assert_same(again["weights"], straight["weights"])


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_run_goes_on(folder: Path) -> None:
    model, root = str(save_model("qwen2", folder / "some")), folder / "failing"
    run = {"name": "run", "model": model, "until": 4, "save": str(root), "save_steps": [1, 2, 3]}
    result = _start([run | {"kill_writers_at": 2}], 2, folder)["run"]
    assert result["last_saved"] == 3
    assert sorted(path.name for path in root.iterdir()) == [".lock", "latest", "step_00000001", "step_00000003"]


def test_killed_at_twenty_instants_no_start_fails_and_nothing_saved_is_lost(tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.kill_worker", str(model), str(tmp_path), "20"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    *starts, end = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(starts) == 20
    for start in starts:
        assert not start["died"], done.stderr[-4000:]
        assert start["resumed"] >= start["known"]
    assert end["identical"] and end["steps"] > 5
    assert "Traceback" not in done.stderr
