"""Whole runs with a sampler: what has to hold in the first step, and what a start makes of a run that was cut off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_flowrl.cli import main
from megatron_flowrl.data.tokenizer import load_tokenizer
from megatron_flowrl.rewards.grader import Item
from megatron_flowrl.rollout.record import RolloutRecord, decode
from tests.distributed.ranks import run_module
from tests.end_to_end.test_export_in_vllm import processes_with
from tests.tiny_tasks import SETTINGS, grade, save_task

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data."""
    return save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def run(task: Path) -> tuple[Path, str]:
    """Three steps on one rank, and what was printed."""
    return train(task, task / "one")


def train(task: Path, folder: Path, ranks: int = 1, **parallel: int) -> tuple[Path, str]:
    """The command that a user gives."""
    settings: dict[str, Any] = SETTINGS | {
        "model.path": task / "model",
        "prompts.path": task / "train.jsonl",
        "evaluation.path": task / "test.jsonl",
        "evaluation.interval": 2,
        "evaluation.n": 2,
        "generation.seeded": True,
        "log_prob.entropy": True,
        "run.folder": folder,
        **{f"parallel.{name}": value for name, value in parallel.items()},
    }
    given = [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in settings.items()]
    done = run_module("megatron_flowrl", ["train", *given], ranks, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]
    assert processes_with(str(task / "model")) == []
    return folder, done.stdout


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def record_of(run: Path, step: int) -> RolloutRecord:
    path = run / "rollouts" / f"{step:08d}.safetensors"
    return decode(path.read_bytes(), str(path))


def exported(run: Path, out: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint."""
    main(["convert", "megatron-to-hf", str(run / "checkpoints"), str(out)])
    return load_file(out / "model.safetensors")


def test_identities_of_the_first_step(run: tuple[Path, str]) -> None:
    steps = {int(line["step"]): line for line in metrics_of(run[0])}
    assert list(steps) == [0, 1, 2, 3]
    first = steps[1]
    assert first["update/first_weight_mean"] == first["update/first_weight_max"] == 1.0
    assert first["update/first_kl_reference"] == first["update/first_kl_old"] == 0.0
    assert all(steps[step]["update/first_weight_max"] == 1.0 for step in (2, 3))
    assert all(steps[step]["mismatch/mean_abs_diff"] < 1e-4 for step in (1, 2, 3))


def test_records_say_what_was_sampled_and_graded(run: tuple[Path, str], task: Path) -> None:
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    text = load_tokenizer(task / "model").decode
    for step in (1, 2, 3):
        record = record_of(run[0], step)
        assert record.position == 4 * (step - 1) and record.prompts == 4 and len(record.sequences) == 16
        assert {span.version for spans in record.weight_versions for span in spans} == {str(step - 1)}
        for sequence, number, reward in zip(record.sequences, record.prompt_numbers, record.rewards, strict=True):
            assert text(sequence.prompt) == rows[number]["prompt"]
            assert grade([Item(text(sequence.response), 150)])[0].score == reward
    taken = [number for step in (1, 2, 3) for number in dict.fromkeys(record_of(run[0], step).prompt_numbers)]
    assert len(set(taken)) == 12


def test_all_of_a_run_is_in_its_folder(run: tuple[Path, str]) -> None:
    folder, printed = run
    last = metrics_of(folder)[-1]
    rooms = {name.partition("/")[0] for name in last if "/" in name}
    assert rooms == {"rollout", "evaluation", "update", "mismatch", "plan", "speed", "memory", "time"}
    assert metrics_of(folder)[2]["sync/gib_per_second"] > 0  # before the last step, evaluation has brought the weights
    assert last["update/entropy"] > 0 and last["update/updates"] == 2 and last["evaluation/coverage"] > 0
    phases = sum(value for name, value in last.items() if name.startswith("time/") and name != "time/step")
    assert phases == pytest.approx(last["time/step"], rel=1e-3)
    assert 0 <= last["speed/rank_wait_seconds"] < last["time/step"]
    assert sum(line.count("step 3/3") for line in printed.splitlines()) == 1
    assert (folder / "checkpoints" / "best").exists() and any((folder / "tensorboard").iterdir())
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 12
    main(["report", str(folder)])
    assert "evaluation" in (folder / "report.html").read_text()


def test_a_start_trains_on_what_was_sampled_before(run: tuple[Path, str], task: Path, tmp_path: Path) -> None:
    """Of step 3 there is a record and no checkpoint: as after a crash in its updates."""
    folder = shutil.copytree(run[0], tmp_path / "cut")
    shutil.rmtree(folder / "checkpoints" / "step_00000003")
    record = (folder / "rollouts" / "00000003.safetensors").read_bytes()
    _, printed = train(task, folder)
    assert "step 3 is trained on what was sampled before" in printed
    assert (folder / "rollouts" / "00000003.safetensors").read_bytes() == record
    assert [line["step"] for line in metrics_of(folder)] == [0, 1, 2, 3]
    before, after = exported(run[0], tmp_path / "before"), exported(folder, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_ranks_give_the_same_answers_to_the_first_prompts(run: tuple[Path, str], task: Path) -> None:
    """The servers' random numbers come from the seed, and the weights are the same."""
    folder, _ = train(task, task / "two", ranks=2, tensor_model_parallel_size=2)
    one, two = record_of(run[0], 1), record_of(folder, 1)
    assert one.prompt_numbers == two.prompt_numbers
    same = [a == b for a, b in zip(one.sequences, two.sequences, strict=True)]
    assert sum(same) >= len(same) - 1  # a token at the edge of two, in fp32
    rewards = [[line["rollout/reward_mean"] for line in metrics_of(path)[1:]] for path in (run[0], folder)]
    assert rewards[0] == pytest.approx(rewards[1], abs=0.1)
