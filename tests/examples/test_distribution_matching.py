"""The example that measures distribution matching exactly: its tasks, its counting, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.distribution_matching.methods import METHODS, SCHEDULES, Outcome, Schedule, settings_of
from examples.distribution_matching.model import answer_log_probs, make_config, sample, write_architecture
from examples.distribution_matching.tasks import TASKS, Task, distance, enumerate_answers
from examples.distribution_matching.train import Run, train
from megatron_flowrl.config import PRESETS
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import Platform, cuda_stand_in, current_platform
from megatron_flowrl.platform.distributed import World, process_groups
from megatron_flowrl.training.experience import gather_experience, score

ALL = list(TASKS.values())


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    """This process's platform. Each run makes its process groups and leaves them."""
    with torch.random.fork_rng(devices=[]):
        yield current_platform()
    cuda_stand_in.uninstall()
    current_platform.cache_clear()


def test_log_partition_of_the_mixture() -> None:
    # A sum of Gaussians of variance 5: (1 + 2 + 1) sqrt(10 pi), but for what lies beyond the 100 states.
    assert TASKS["mixture"].log_partition.item() == pytest.approx(3.110, abs=5e-4)


def test_prompts_of_the_conditional_task_differ() -> None:
    task = TASKS["conditional"]
    assert [len(modes) for modes in task.modes] == [1, 2, 3, 5]
    assert task.log_target.shape == (4, 4096)
    gaps = torch.cdist(task.log_partition[:, None], task.log_partition[:, None]) + torch.eye(4)
    assert gaps.min() > 0.1


def test_answers_of_every_length() -> None:
    answers = enumerate_answers(4, 4, 0)
    assert len(answers) == len(set(answers)) == 121
    assert [sum(len(a) == n for a in answers) for n in (1, 2, 3, 4)] == [1, 3, 9, 27 + 81]
    assert all(0 not in answer[:-1] for answer in answers)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_distance_of_the_target_and_of_one_answer(task: Task) -> None:
    exact = distance(task, torch.log_softmax(task.log_target, dim=1))
    assert exact.kl_target_policy == pytest.approx(0, abs=1e-12)
    assert exact.kl_policy_target == pytest.approx(0, abs=1e-12)
    assert exact.modes_covered == task.num_modes
    best = torch.full_like(task.log_target, -30.0)
    best[range(len(best)), task.log_target.argmax(1)] = 0.0
    collapsed = distance(task, torch.log_softmax(best, dim=1))
    assert collapsed.modes_covered == len(task.prompts)
    assert collapsed.kl_target_policy > 5


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_counting_is_what_the_trainer_computes(task: Task, platform: Platform, tmp_path: Path) -> None:
    write_architecture(task, tmp_path)
    schedule = replace(SCHEDULES[task.name], steps=3, samples=16)
    config = make_config(tmp_path, settings_of("flowrl_scaled", schedule, 0))
    with process_groups(World(), config.parallel, platform, 0):
        run = Run(task, "flowrl_scaled", schedule, config, 0)
        for step in (1, 2):
            run.step(step)
        log_probs = answer_log_probs(run.model, task)
        sequences = sample(run.model, task, 8, torch.Generator().manual_seed(3))
        prompts = [index // 8 for index in range(len(sequences))]
        experience = gather_experience(sequences, [0.0] * len(sequences), prompts, config)
        packing = plan([len(s) for s in sequences], packing_rules(config, run.model.architecture, 1))
        scored = score(run.model.chunks, experience, packing, config, platform.device)
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(len(task.prompts), dtype=torch.float64), atol=1e-9)
    assert [sequence.prompt for sequence in sequences] == [task.prompts[prompt] for prompt in prompts]
    sums = torch.stack([scored.of_sequence(i)[0].double().sum() for i in range(len(sequences))])
    expected = log_probs[prompts, [task.column[sequence.response] for sequence in sequences]]
    assert torch.allclose(sums, expected, atol=1e-5)


def test_exact_flowrl_learns_the_mixture(platform: Platform) -> None:
    outcome = train(TASKS["mixture"], "flowrl_exact", Schedule(steps=80), seed=1)
    first, last = outcome.course[0][1], outcome.course[-1][1]
    assert first > 1
    assert last == outcome.figures["kl_target_policy"] < 0.1
    assert outcome.figures["modes_covered"] == 3
    assert outcome.skipped_updates == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(name: str, platform: Platform) -> None:
    outcome = train(TASKS["unequal"], name, Schedule(steps=2, samples=8), seed=1)
    assert outcome.course[-1][0] == 2
    learns_log_z = name.startswith("flowrl")
    assert (outcome.figures["log_z_error"] is not None) == learns_log_z
    assert outcome.policy.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_published_forms_keep_their_settings(preset: str, tmp_path: Path) -> None:
    write_architecture(TASKS["mixture"], tmp_path)
    config = make_config(tmp_path, settings_of(f"flowrl_{preset}", SCHEDULES["mixture"], 0))
    for key, value in PRESETS[preset].items():
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == value
    assert config.flowrl.reference == "reference"


def test_result_has_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.distribution_matching import __main__ as program

    def outcome(run: tuple[str, str]) -> Outcome:
        task = TASKS[run[0]]
        log_probs = torch.log_softmax(torch.zeros_like(task.log_target), dim=1)
        found = distance(task, log_probs)
        figures = {**vars(found), "log_z_error": 0.25 if run[1].startswith("flowrl") else None}
        return Outcome(figures, [(0, 1.0), (2, 0.5)], log_probs.exp(), 0, 1.0)

    monkeypatch.setattr(program, "run_all", lambda runs, schedules, seed: {run: outcome(run) for run in runs})
    program.main(["--out", str(tmp_path), "--steps", "2"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"mixture", "conditional", "unequal", "about"}
    for task in TASKS:
        expected = {name for name, method in METHODS.items() if task in method.tasks}
        assert set(result[task]) == expected
        for figures in result[task].values():
            assert set(figures) == {"kl_target_policy", "kl_policy_target", "modes_covered", "log_z_error"}
    assert result["about"]["methods"]["grpo"]["reward"] == "target"
    assert result["about"]["methods"]["flowrl_exact"]["settings"]["flowrl.beta"] == 1.0
    assert result["about"]["tasks"]["mixture"]["log_partition"] == [pytest.approx(3.110, abs=5e-4)]
    assert (tmp_path / "figure1.png").stat().st_size > 10_000
    assert (tmp_path / "training.png").stat().st_size > 10_000
