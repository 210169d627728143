"""The command as it is given: through to its end for a recipe, and with a status that says whose fault it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_flowrl.dry_run import __main__ as command
from megatron_flowrl.dry_run.layout import Parts
from megatron_flowrl.dry_run.training import DryRunFailed
from tests.distributed.ranks import REPOSITORY
from tests.tiny_models import MODELS

RECIPE = """
base: below.yaml
parallel: {tensor_model_parallel_size: 2, sequence_parallel: true, pipeline_model_parallel_size: 2}
recompute: {recompute_granularity: selective, recompute_modules: [mlp]}
reference: {placement: host}
ddp: {overlap_grad_reduce: true, overlap_param_gather: true}
objective: {preset: paper}
precision: {fp8: e4m3, fp8_recipe: blockwise}
rollout: {quantization: fp8_per_block}
"""
SIZES = "run: {prompts_per_step: 8, prompts_per_mini_batch: 4}\nprompts: {max_tokens: 20}\ngeneration: {max_tokens: 40}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Of a model with a config.json and no weights."""
    MODELS["qwen2"].save_pretrained(tmp_path / "model")
    (tmp_path / "below.yaml").write_text(f"model: {{path: {tmp_path / 'model'}}}\n{SIZES}")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_recipe_to_its_end(recipe: Path) -> None:
    model = recipe.parent / "model" / "config.json"
    model.write_text(model.read_text().replace('"intermediate_size": 80', '"intermediate_size": 96'))
    model.write_text(model.read_text().replace('"hidden_size": 48', '"hidden_size": 64'))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_flowrl.dry_run", str(recipe), "--gpus", "4"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "4 layers of width 64; 4 ranks = TP2 x PP2 x CP1 x DP1",
        "layout: 51 tensors, each held once in 4 parts",
        "packing: sequences 64, mini-batches 2 x ranks 1",
        "schedule: stages wait",
        "train: 2 steps of 2 updates on 4 ranks, 4 layers of width 32, 4 heads in 2 groups, blockwise FP8 emulated",
        "first_weight_max 1, first_kl_old 0, first_kl_reference 0",
        "left out, as it needs a GPU: rollout.quantization = fp8_per_block",
        "not exercised: memory, speed, NCCL",
    ):
        assert words in done.stdout, done.stdout


def test_whose_fault_it_is(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def status(*arguments: str) -> object:
        with pytest.raises(SystemExit) as caught:
            command.main([str(recipe), *arguments, "precision.fp8=null", "precision.fp8_recipe=tensorwise"])
        return caught.value.code

    assert status("--gpus", "6") == 2 and "6 processes cannot be shared out evenly" in capsys.readouterr().err
    assert status("--gpus", "0") == 2 and "one at least" in capsys.readouterr().err
    assert status("--gpus", "8", "model.path=gone") == 2 and "model.path = 'gone'" in capsys.readouterr().err

    def fails(*_: object) -> None:
        raise DryRunFailed("what it said")

    monkeypatch.setattr(command, "train_small", fails)
    assert status("--gpus", "8") == 1 and "what it said" in capsys.readouterr().err


def test_make_says_how_it_is_called() -> None:
    done = subprocess.run(["make", "-n", "dry-run"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0 and "make dry-run RECIPE=recipe.yaml [GPUS=32]" in done.stderr
    given = ["make", "-n", "dry-run", "RECIPE=a.yaml", "GPUS=4", "ARGS=seed=1"]
    said = subprocess.run(given, cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert "-m megatron_flowrl.dry_run a.yaml --gpus 4 seed=1" in said
    said = subprocess.run(given[:4], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert "-m megatron_flowrl.dry_run a.yaml" in said and "--gpus" not in said


def test_without_gpus_as_few_nodes_as_the_layout_takes(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "check_ranks", lambda config, shape, gpus, log_z: Parts(parameters=[gpus]))
    plain = ["precision.fp8=null", "precision.fp8_recipe=tensorwise"]
    for arguments, sizes in (
        ([], "8 ranks = TP2 x PP2 x CP1 x DP2"),
        (["--gpus-per-node", "2"], "4 ranks = TP2 x PP2 x CP1 x DP1"),
    ):
        command.main([str(recipe), "--layout-only", *arguments, *plain])
        assert sizes in capsys.readouterr().out
