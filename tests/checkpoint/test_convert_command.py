"""`megatron-flowrl convert` as its users run it, its refusals included."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_flowrl.checkpoint import export
from megatron_flowrl.checkpoint.manifest import read_manifest
from megatron_flowrl.cli import main
from tests.distributed.ranks import REPOSITORY
from tests.tiny_models import random_sequences, save_model
from tests.training.score_inputs import json_lines

pytestmark = pytest.mark.usefixtures("process_as_it_was")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_tied", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    out = tmp_path_factory.mktemp("out") / "run"
    main(["convert", "hf-to-megatron", str(model), str(out)])
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is printed by a command that ends with status 2 and without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main(["convert", *map(str, arguments)])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return " ".join(printed.split())


def test_there_and_back(run: Path, model: Path, tmp_path: Path) -> None:
    main(["convert", "megatron-to-hf", str(run), str(tmp_path / "out"), "--max-shard-size", "0.1MB"])
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    found = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    expected = load_file(model / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_one_checkpoint_of_a_run_can_be_named(run: Path, tmp_path: Path) -> None:
    main(["convert", "megatron-to-hf", str(run / "step_00000000"), str(tmp_path / "out"), "--dtype", "float16"])
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_half_precision_files_are_kept_exactly(model: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(model, tmp_path / "half"))
    tensors = {n: t.half() for n, t in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    main(["convert", "hf-to-megatron", str(half), str(tmp_path / "run")])
    main(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float16"])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)


def test_a_dtype_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    main(["convert", "hf-to-megatron", str(model), str(tmp_path / "run"), "precision.dtype=bfloat16"])
    main(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out")])
    expected = load_file(model / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], expected[n].bfloat16()) for n in expected)


def test_a_recipe_gives_the_dtype_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("precision: {dtype: bfloat16}\n")
    main(["convert", "hf-to-megatron", str(model), str(tmp_path / "run"), "--recipe", str(tmp_path / "recipe.yaml")])
    assert read_manifest(tmp_path / "run" / "step_00000000").config["precision"]["dtype"] == "bfloat16"


def test_an_export_is_of_the_checkpoint_whatever_the_recipe_began_with(run: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {init: random}\nprecision: {fp8: hybrid}\n")
    recipe = ["--recipe", str(tmp_path / "recipe.yaml")]
    main(["convert", "megatron-to-hf", str(run), str(tmp_path / "out"), *recipe])
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_random_weights_need_only_a_configuration(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bare")
    main(["convert", "hf-to-megatron", str(tmp_path / "bare"), str(tmp_path / "run"), "model.init=random"])
    main(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out")])
    assert load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].std() > 0


def test_score_takes_a_checkpoint(run: Path, model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json_lines(random_sequences(5))))
    for path, out in ((model, "hf"), (run, "run"), (run / "step_00000000", "step")):
        main(
            [
                "score",
                "--model",
                str(path),
                "--input",
                str(lines),
                "--output",
                str(tmp_path / out),
                "precision.dtype=float32",
            ]
        )
    assert (tmp_path / "hf").read_text() == (tmp_path / "run").read_text() == (tmp_path / "step").read_text()


def test_inspect_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "inspect", str(run)])
    printed = capsys.readouterr().out
    for line in (
        r"checkpoint .*/run/step_00000000",
        r"step       0",
        r"holds      model",
        r"saved by   world 1, tensor_model_parallel 1,.*",
        r"family     qwen2, tied embeddings: num_layers 4, hidden_size 48, .*vocab_size 299",
        r"  decoder\.layers\.mlp\.linear_fc1\.weight +float32 +4 x 160 x 48 +0\.123 MB",
        r"tensors    9: [\d,]+ float32; 0\.\d MB",
        r"checksums  \d files, .*: all as written",
    ):
        assert re.search(f"^{line}$", printed, re.MULTILINE), line


def test_inspect_a_hugging_face_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "inspect", str(model)])
    printed = capsys.readouterr().out
    assert re.search(r"^  model\.embed_tokens\.weight +float32 +299 x 48 ", printed, re.MULTILINE)
    assert "tensors    50: " in printed and "lm_head" not in printed


def test_inspect_names_a_damaged_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    file = max((copy / "step_00000000").glob("*.distcp"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert f"{file} is damaged: its SHA-256 is not the one that was recorded" in refused(capsys, "inspect", copy)


def test_what_cannot_be_converted_is_named(
    run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    for arguments, message in (
        (("hf-to-megatron", tmp_path / "gone", out), "gone' does not exist: give the path of a Hugging Face folder"),
        (("hf-to-megatron", empty, out), "empty/config.json does not exist"),
        (("hf-to-megatron", run, out), "is a checkpoint already: hf-to-megatron takes a Hugging Face folder"),
        (("hf-to-megatron", model, run), "run' is not empty (latest, ...); give another"),
        (("hf-to-megatron", model, tmp_path / "a" / "b"), "a' does not exist; create it"),
        (("hf-to-megatron", model, model / "config.json"), "config.json' exists already; give another"),
        (("hf-to-megatron", model, out, "parallel.tensor_model_parallel_size=2"), "1 process"),
        (("hf-to-megatron", model, out, "optimizer.lr=1"), "optimizer"),
        (("hf-to-megatron", model, out, "precision.dtyp=float32"), "precision.dtype"),
        (("megatron-to-hf", model, out), "is no checkpoint of this program: it has neither a manifest nor"),
        (("megatron-to-hf", tmp_path / "gone", out), "gone' is no checkpoint of this program"),
        (("megatron-to-hf", run, empty), "empty' exists already; give another, or remove it first"),
        (("megatron-to-hf", run, out, "precision.dtype=float32"), "precision.dtype"),
        (("megatron-to-hf", run, out, "--dtype", "int8"), "invalid choice: 'int8'"),
        (("megatron-to-hf", run, out, "--max-shard-size", "many"), "'many' is not a size above 0 such as 5GB or 200MB"),
        (("megatron-to-hf", run, out, "--max-shard-size", "0"), "'0' is not a size above 0"),
        (("inspect", tmp_path / "gone"), "gone' does not exist"),
        (("explode", run), "invalid choice: 'explode'"),
    ):
        assert message in refused(capsys, *arguments), arguments
        assert not out.exists()


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "step_00000000" / ".metadata").unlink()
    assert ".metadata is missing" in refused(capsys, "megatron-to-hf", copy, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_full_disk_leaves_no_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(export.SafetensorsWriter, "write", full)
    assert "out' cannot be written: No space left on device" in refused(capsys, "megatron-to-hf", run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_import_that_was_cut_off_can_be_repeated(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / ".step_00000000.partial-dead").mkdir(parents=True)
    main(["convert", "hf-to-megatron", str(model), str(tmp_path / "run")])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "latest", "step_00000000"]


@pytest.mark.parametrize(
    "script, kind",
    [("hf_to_megatron", "hf-to-megatron"), ("megatron_to_hf", "megatron-to-hf"), ("inspect_checkpoint", "inspect")],
)
def test_the_scripts_are_the_command(
    script: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "tools" / f"{script}.py"), run_name="__main__")
    assert caught.value.code == 0 and f"megatron-flowrl convert {kind}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["hf-to-megatron", "megatron-to-hf", "inspect"])
def test_help_names_the_settings(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", kind, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "logging.level" in printed
    assert ("parallel.tensor_model_parallel_size" in printed) == (kind != "inspect")
    assert ("precision.dtype" in printed) == (kind == "hf-to-megatron")
