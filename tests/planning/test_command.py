"""`megatron-flowrl plan`: what it prints, what it refuses, what it finds better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.cli import TRAIN_SECTIONS, main
from megatron_flowrl.config import Config, load_config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.planning import plan as planning
from megatron_flowrl.planning.parameters import Stage, counted_stages
from megatron_flowrl.planning.refusals import Cluster, check_run

RECIPE = """
model: {path: Qwen/Qwen2.5-7B}
run: {steps: 100, prompts_per_step: 512, prompts_per_mini_batch: 128}
generation: {n: 8, max_tokens: 8192}
parallel: {tensor_model_parallel_size: 4, sequence_parallel: true}
rollout: {colocated: true, servers: 8, extra_arguments: [--gpu-memory-utilization=0.5]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """With counted parameters: that the real ones are the same, tests/planning/test_meta.py says. With no search."""

    def counted(architecture: Architecture, config: Config, world: int, *, log_z: bool) -> list[Stage]:
        return counted_stages(architecture, config, log_z=log_z)

    monkeypatch.setattr(planning, "real_stages", counted)
    if "searches" not in request.fixturenames:
        monkeypatch.setattr(planning, "better_layouts", lambda config, setting, given: [])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def searches() -> None:
    """For tests that look for better layouts."""


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["plan", *arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_json(recipe: Path, searches: None, capsys: pytest.CaptureFixture[str], logging_as_it_was: None) -> None:
    found = planned(capsys, str(recipe), "--gpus", "32", "--response-tokens", "3000")
    assert found["parameters"] == 7_615_616_512 and found["data_parallel_size"] == 8 and found["fits"]
    kinds = ("weights", "gradients", "optimizer", "activations", "log_prob", "log_z", "reference", "recomputation")
    memory = found["memory_per_rank"]
    assert {*kinds} <= {*memory} and memory["total"] < found["gpu_memory"]
    assert memory["weights"] == pytest.approx(7_615_616_512 * 2 / 4, rel=1e-3)
    assert found["seconds"]["step"] == pytest.approx(sum(v for k, v in found["seconds"].items() if k != "step"))
    hours = 100 * found["seconds"]["step"] / 3600
    assert found["run"] == {"steps": 100, "hours": hours, "dollars": pytest.approx(hours * 32 * 2.5)}
    assert any("run.folder and prompts.path" in note for note in found["notes"])
    # Half the tensor parallelism is faster there; as settings, it is what they say.
    best = found["better"][0]
    assert best["step_seconds"] < 0.95 * found["seconds"]["step"]
    again = planned(capsys, str(recipe), "--gpus", "32", "--response-tokens", "3000", *best["overrides"])
    assert again["seconds"]["step"] == pytest.approx(best["step_seconds"]) and again["fits"] and not again["better"]
    assert again["memory_per_rank"]["total"] == pytest.approx(best["memory_per_rank"]["total"])


def test_text(recipe: Path, capsys: pytest.CaptureFixture[str], logging_as_it_was: None) -> None:
    main(["plan", str(recipe), "--gpus", "16"])
    text = capsys.readouterr().out
    assert "16 H100 train, TP4 (SP) x PP1 x CP1 x DP4" in text and "it fits the H100" in text
    assert "published shape of Qwen2.5-7B" in text and "dollars" in text
    (activations,) = [line for line in text.splitlines() if line.startswith("  activations ")]
    assert "by Transformer Engine's documentation" in activations


def test_what_does_not_fit_is_said_with_a_cure(
    recipe: Path, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    whole = planned(capsys, str(recipe), "rollout.extra_arguments=[]")
    assert not whole["fits"] and "set rollout.extra_arguments=[--gpu-memory-utilization=0." in whole["problems"][0]
    cure = whole["problems"][0].partition("set ")[2].partition(" or less")[0]
    assert planned(capsys, str(recipe), cure)["fits"]
    # TP1 keeps so much that what would be left is too little for vLLM's weights.
    single = planned(capsys, str(recipe), "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    (problem,) = [one for one in single["problems"] if one.startswith("beside")]
    assert "raise parallel.tensor_model_parallel_size" in problem and "set rollout.extra_arguments" not in problem
    large = planned(capsys, str(recipe), "model.path=Qwen/Qwen2.5-32B", "parallel.tensor_model_parallel_size=8")
    assert not large["fits"] and large["problems"][0].startswith("training takes")


def test_without_room_for_keys_and_values_no_time_is_known(
    recipe: Path, searches: None, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    small = "rollout.extra_arguments=[--gpu-memory-utilization=0.2]"
    found = planned(capsys, str(recipe), small)
    assert found["seconds"]["rollout"] is None and found["seconds"]["step"] is None and found["seconds"]["update"] > 0
    assert found["run"] == {"steps": 100, "hours": None, "dollars": None}
    assert not found["fits"] and not found["better"]
    assert "keys and values of 0 tokens" in found["problems"][0] and "weights take 15.2" in found["problems"][0]
    assert "--gpu-memory-utilization (rollout.extra_arguments) to 0.2" in found["problems"][0]
    main(["plan", str(recipe), small])
    text = capsys.readouterr().out
    assert "hours and dollars are not known" in text and "what does not fit is the sampler" in text
    assert "nan" not in text


def test_evaluations_are_a_part_of_hours(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    plain, rows = planned(capsys, str(recipe)), tmp_path / "held_out.jsonl"
    rows.write_text('{"problem": "?"}\n' * 200)
    given = (f"evaluation.path={rows}", "evaluation.interval=30", "evaluation.n=16")
    found = planned(capsys, str(recipe), *given)["evaluation"]
    assert found["prompts"] == 200 and found["times"] == 1 + 4  # before, 30, 60, 90, 100
    hours = planned(capsys, str(recipe), *given)["run"]["hours"]
    assert hours == pytest.approx(plain["run"]["hours"] + 5 * found["seconds"] / 3600)
    assert planned(capsys, str(recipe), *given, "evaluation.limit=10")["evaluation"]["prompts"] == 10
    elsewhere = planned(capsys, str(recipe), "evaluation.path=nowhere.jsonl")
    assert elsewhere["run"] == plain["run"] and elsewhere["evaluation"]["seconds"] is None
    assert any("evaluations are left out of hours" in note for note in elsewhere["notes"])


def test_what_is_found_better_is_accepted_by_a_run(recipe: Path, searches: None) -> None:
    """float32 does not go with context parallelism on a GPU."""
    given = ["precision.dtype=float32", "rollout.dtype=float32", "rollout.tensor_parallel_size=2", "rollout.servers=4"]
    recipe.write_text(
        RECIPE.replace("sequence_parallel: true", "sequence_parallel: true, pipeline_model_parallel_size: 4")
    )
    config = load_config(recipe, given, TRAIN_SECTIONS, "plan")
    found = planning.make_plan(config, planning.Options(gpu="H200", gpus=16))
    assert found.better
    for one in found.better:
        better = load_config(recipe, [*given, *one.overrides], TRAIN_SECTIONS, "plan")
        check_run(better, Cluster(16, 8), found.setting.workload, found.setting.gpu)


def test_hardware_can_be_replaced(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    slow = tmp_path / "slow.yaml"
    slow.write_text("efficiency: {busy: 0.325}\ngpus: {H100: {price: 5}}\n")
    usual, halved = planned(capsys, str(recipe)), planned(capsys, str(recipe), "--hardware", str(slow))
    assert halved["seconds"]["reference_log_probs"] == pytest.approx(2 * usual["seconds"]["reference_log_probs"])
    assert halved["run"]["dollars"] == pytest.approx(
        2 * usual["run"]["dollars"] * halved["run"]["hours"] / usual["run"]["hours"]
    )
    slow.write_text("efficiency: {busy: 2}\nspeed: 1\n")
    error = refused(capsys, str(recipe), "--hardware", str(slow))
    assert "efficiency.busy" in error and "speed" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.path=nobody/Nothing-1B"], "model.path = 'nobody/Nothing-1B'"),
        (["parallel.tensor_model_parallel_size=3"], "does not divide the model's num_attention_heads = 28"),
        (["parallel.tensor_model_parallel_size=16"], "more than the 8 GPUs of a node"),
        (["--gpus", "12"], "no whole nodes"),
        (["data.tokens_per_micro_batch=4096"], "data.tokens_per_micro_batch = 4096 is too small"),
        (["model.max_sequence_length=4096"], "is above 4096, the longest sequence"),
        (["precision.fp8=hybrid", "--gpu", "A100"], "needs a GPU of compute capability 8.9"),
        (["precision.fp8=hybrid", "precision.fp8_recipe=mxfp8"], "needs a GPU of compute capability 10.0"),
        (["rollout.quantization=fp8_per_tensor", "--gpu", "A100"], "rollout.quantization = fp8_per_tensor: no peak of"),
        (["rollout.servers=4", "rollout.tensor_parallel_size=4"], "take 16 GPUs, and a node has 8"),
        (["rollout.tensor_parallel_size=3", "rollout.servers=1"], "rollout.tensor_parallel_size = 3 does not divide"),
        (["rollout.transfer=shm"], "moves weights between CPUs"),
        (["run.prompts_per_mini_batch=100"], "is no multiple of run.prompts_per_mini_batch = 100"),
        (["run.prompts_per_mini_batch=1", "generation.n=1", "--gpus", "64"], "fewer than the 16 data-parallel ranks"),
        (["objective.name=nowhere.at_all"], "cannot be imported"),
        (["--response-tokens", "9000"], "--response-tokens 9000 is above generation.max_tokens = 8192"),
        (["reward.grader=answer_matches"], "did you mean 'answer_match'"),
        (["reward.grader=math + 0.1 * regex"], "needs reward.pattern"),
        (["reward.grader=tests.tiny_tasks.grades"], "has no 'grades'"),
        (["--gpu", "H900"], "--gpu H900 is not known"),
        (["sft.path=x"], "`plan` does not read sft.path"),
    ],
)
def test_what_a_run_would_refuse(
    arguments: list[str], words: str, recipe: Path, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    assert words in refused(capsys, str(recipe), *arguments)


def test_every_problem_is_told_at_once(
    recipe: Path, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    error = refused(capsys, str(recipe), "parallel.tensor_model_parallel_size=3", "data.tokens_per_micro_batch=64")
    assert "num_attention_heads" in error and "data.tokens_per_micro_batch" in error


def test_a_grader_that_does_not_import_here_is_a_note(
    recipe: Path, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    notes = planned(capsys, str(recipe), "reward.grader=not_here.grade")["notes"]
    assert any(note.startswith("on this machine: ") and "no module 'not_here'" in note for note in notes)
