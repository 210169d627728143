"""What `train` and `sft` are given and cannot use: told by name, value and cure, before a model is built."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.cli import main
from megatron_flowrl.rollout.record import RecordFolder
from megatron_flowrl.training import journal, loop, sft
from tests.tiny_tasks import SETTINGS, WORDS, save_task, save_tokenizer, write_rows
from tests.training.recorded import write_records

ROW = {"prompt": "w2 w3", "ground_truth": 150}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and records."""
    folder = save_task(tmp_path_factory.mktemp("task"))
    write_records(folder, folder / "records", 2)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model that is built is too late."""

    def built(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    for module in (loop, sft):
        monkeypatch.setattr(module, "Trainer", built)
    yield


@pytest.fixture
def refused(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said of a command with other settings. None: the setting is left out."""

    def saying(command: str = "train", **settings: Any) -> str:
        given: dict[str, Any] = SETTINGS | {
            "model.path": task / "model",
            "prompts.path": task / "train.jsonl",
            "run.folder": tmp_path / "run",
        }
        if command == "sft":
            given = {k: v for k, v in given.items() if k.partition(".")[0] not in ("rollout", "generation", "reward")}
            given = {k: v for k, v in given.items() if k not in ("prompts.path", "run.prompts_per_step")}
            given |= {"sft.path": task / "sft.jsonl", "sft.sequences_per_step": 8}
            given.pop("run.prompts_per_mini_batch")
        given |= {name.replace("__", "."): value for name, value in settings.items()}
        texts = {k: json.dumps(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
        with pytest.raises(SystemExit) as caught:
            main([command, *(f"{name}={value}" for name, value in texts.items())])
        assert caught.value.code == 2
        return capsys.readouterr().err

    return saying


def data(path: Path, rows: list[Any], broken: int | None = None) -> Path:
    write_rows(path, rows)
    if broken is not None:
        lines = path.read_text().splitlines()
        lines[broken - 1] = lines[broken - 1][:-3]
        path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("rows", "broken", "parts"),
    [
        ([{"question": "w2", "ground_truth": 1}], None, ["rows.jsonl:1", "prompt", "there are question"]),
        ([], None, ["prompts.path", "has no rows"]),
        ([ROW] * 8, 7, ["rows.jsonl:7", "not JSON"]),
        ([{"prompt": [2] * 15, "ground_truth": 1}] * 4, None, ["a prompt of 15 tokens", "lower generation.max_tokens"]),
        ([{"prompt": [2] * 30, "ground_truth": 1}] * 4, None, ["prompts.max_tokens = 16", "raise"]),
        ([{"prompt": [2, 900], "ground_truth": 1}] * 4, None, ["prompt[1] = 900", "vocabulary of 299"]),
        ([ROW] * 3, None, ["run.prompts_per_step = 4", "has 3", "lower it"]),
    ],
)
def test_rows(rows: list[Any], broken: int | None, parts: list[str], refused: Any, tmp_path: Path) -> None:
    longer = {"generation__max_tokens": 60} if "a prompt of 15 tokens" in parts else {}
    said = refused(prompts__path=data(tmp_path / "rows.jsonl", rows, broken), **longer)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"prompts__path": "gone.jsonl"}, ["gone.jsonl", "does not exist"]),
        ({"prompts__path": None}, ["prompts.path", "empty"]),
        ({"evaluation__path": "gone.jsonl"}, ["gone.jsonl", "does not exist"]),
        ({"model__path": "gone"}, ["gone"]),
        ({"run__folder": None}, ["run.folder", "empty"]),
        ({"reward__grader": "countdwn"}, ["countdwn", "did you mean 'countdown'"]),
        ({"reward__grader": "tests.tiny_tasks.grad"}, ["tests.tiny_tasks", "grad"]),
        ({"reward__grader": "countdown"}, ["train.jsonl:1", "no numbers and target"]),
        ({"run__prompts_per_mini_batch": 3}, ["run.prompts_per_mini_batch = 3", "no multiple"]),
        ({"data__tokens_per_micro_batch": 20}, ["data.tokens_per_micro_batch", "20", "raise it"]),
        ({"objective__name": "flowl"}, ["objective.name = flowl is none of flowrl, grpo"]),
        ({"rollout__replay": "gone"}, ["rollout.replay", "gone", "RUN/rollouts"]),
        ({"run__stepz": 3}, ["stepz", "steps"]),
        ({"parallel__tensor_model_parallel_size": 2}, ["tensor_model_parallel_size"]),
        ({"generation__max_tokens": 400}, ["400"]),
    ],
)
def test_settings(settings: dict[str, Any], parts: list[str], refused: Any) -> None:
    said = refused(**settings)
    assert all(part in said for part in parts), said


def test_another_models_tokenizer(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    save_tokenizer(tmp_path / "other", [*WORDS, "w999"])
    said = refused(data__tokenizer=tmp_path / "other")
    assert "gives token ids up to 299" in said and "vocabulary has 299" in said


def test_no_tokenizer(refused: Any, task: Path, tmp_path: Path) -> None:
    shutil.copytree(task / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "has no tokenizer that can be loaded" in refused(model__path=tmp_path / "model")


def test_a_file_where_the_run_goes(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "run.folder" in (said := refused(run__folder=tmp_path / "file" / "run")) and "cannot be written" in said


def test_a_folder_of_another_run(refused: Any, tmp_path: Path) -> None:
    """And what that run is writing there is left alone."""
    (tmp_path / "run").mkdir()
    partial = tmp_path / "run" / ".metrics.jsonl.partial-1"
    partial.touch()
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "is in use: another run writes there; give another run.folder" in refused(
            checkpoint__save=tmp_path / "elsewhere"
        )
        other.kill()
    assert partial.exists()


def test_a_full_disk(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "write_file", full)
    assert "No space left on device; give another, or make room" in refused()


def test_a_record_that_is_damaged_or_missing(
    task: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These are found when they are used: the model has been built."""
    monkeypatch.undo()
    said = refused(rollout__replay=task / "records", run__steps=3)
    assert "has no record of step 3 (there are those of steps 1 to 2); lower run.steps" in said
    records = RecordFolder(Path(shutil.copytree(task / "records", tmp_path / "records")))
    path = records.path_of(1)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert f"{path} is no whole record of a rollout" in refused(
        rollout__replay=records.root, run__folder=tmp_path / "other", run__steps=1
    )


def test_two_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "one.yaml", "two.yaml"])
    assert caught.value.code == 2 and "one recipe is wanted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"sft__path": None}, ["sft.path", "empty"]),
        ({"sft__sequences_per_step": 64}, ["sft.sequences_per_step = 64", "has 64 rows", "validation"]),
        ({"sft__response_column": "reply"}, ["the key reply is missing", "there are prompt, response"]),
    ],
)
def test_supervised_training(settings: dict[str, Any], parts: list[str], refused: Any) -> None:
    said = refused("sft", **settings)
    assert all(part in said for part in parts), said
