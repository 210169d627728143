"""Where a step's answers come from: a record is there before it is used, and is used again."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_flowrl.config import Config, SharedUserError, load_config
from megatron_flowrl.data.prompts import Prompt, PromptSet
from megatron_flowrl.observe.log import logger
from megatron_flowrl.observe.timers import Timers
from megatron_flowrl.rewards.grader import Grade
from megatron_flowrl.rollout import record
from megatron_flowrl.rollout.generation import Answer, VersionSpan
from megatron_flowrl.training.answers import Graded
from megatron_flowrl.training.rollouts import Rollouts

VOCABULARY = 10
PROMPTS = PromptSet(tuple(Prompt((number,), str(number), 1, {}) for number in range(10)), 0, "here", "mark")


@pytest.fixture(autouse=True)
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank; and log lines that a test can read."""
    monkeypatch.setattr(logger, "propagate", True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Sampled:
    """Stands in for sampler and graders: two answers to each prompt, its own tokens."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []

    def sample(self, prompts: Any, sampling: Any, n: int, version: str, timed: Any, what: str) -> list[Graded]:
        self.asked.append((version, [prompt.tokens[0] for prompt in prompts]))
        return [
            Graded(
                Answer(index, sample, (5, 1), (-1.0, -2.0), "stop", (VersionSpan(version, 0, 2),), "url"),
                prompt,
                "text",
                Grade(float(sample), "key"),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(n)
        ]


def settings(**more: Any) -> Config:
    names = {"run.prompts_per_step": 3, "run.prompts_per_mini_batch": 3, "generation.n": 2, **more}
    return load_config(None, [f"{name.replace('__', '.')}={value}" for name, value in names.items()])


def rollouts(folder: Path, answers: Any, config: Config | None = None) -> Rollouts:
    return Rollouts(config or settings(), PROMPTS, answers, (1,), VOCABULARY, folder)


def test_a_step_is_on_disk_when_it_is_returned_and_is_not_sampled_again(tmp_path: Path) -> None:
    first, second = Sampled(), Sampled()
    found = rollouts(tmp_path, first).take(2, 3, Timers())
    assert (tmp_path / "00000002.safetensors").is_file()
    assert [version for version, _ in first.asked] == ["1"] and len(found.sequences) == 6
    assert found.rewards == (0.0, 1.0) * 3 and (found.position, found.next_position) == (3, 6)
    assert rollouts(tmp_path, second).take(2, 3, Timers()).sequences == found.sequences and not second.asked


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    rollouts(tmp_path, Sampled()).take(1, 0, Timers())
    config = settings(rollout__replay=tmp_path)
    assert Rollouts(config, None, None, (1,), VOCABULARY, tmp_path / "own").take(1, 0, Timers()).step == 1
    with pytest.raises(SharedUserError, match=r"00000001.safetensors has token \d, and the model's vocabulary has 5:"):
        Rollouts(config, None, None, (1,), 5, tmp_path / "own").take(1, 0, Timers())


def test_all_prompts_come_before_one_comes_again(tmp_path: Path) -> None:
    answers = Sampled()
    taken = rollouts(tmp_path, answers)
    for step in range(3):
        taken.take(step + 1, 3 * step, Timers())
    numbers = [number for _, some in answers.asked for number in some]
    assert len(set(numbers)) == 9


@pytest.mark.parametrize("change", ["damaged", "position", "seed", "reward"])
def test_what_is_of_no_use_is_sampled_again(change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rollouts(tmp_path, Sampled()).take(1, 0, Timers())
    path, answers, position, config = tmp_path / "00000001.safetensors", Sampled(), 0, settings()
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:-3])
    elif change == "position":
        position = 3
    elif change == "seed":
        config = settings(seed=5)
    else:
        config = settings(reward__correct_from=0.5)
    with caplog.at_level(logging.WARNING, logger.name):
        rollouts(tmp_path, answers, config).take(1, position, Timers())
    assert len(answers.asked) == 1 and "sampled again" in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize("change", [{"optimizer__lr": 1e-4}, {"flowrl__beta": 3}, {"model__path": "other"}])
def test_answers_of_a_policy_that_is_not_to_be_are_sampled_again(change: dict[str, Any], tmp_path: Path) -> None:
    rollouts(tmp_path, Sampled()).take(1, 0, Timers())
    answers = Sampled()
    rollouts(tmp_path, answers, settings(**change)).take(1, 0, Timers())
    assert len(answers.asked) == 1


def test_after_new_answers_no_older_record_is_used(tmp_path: Path) -> None:
    """The records of later steps are answers of a policy that these do not lead to."""
    before = rollouts(tmp_path, Sampled())
    for step in (1, 2, 3):
        before.take(step, 3 * (step - 1), Timers())
    (tmp_path / "00000002.safetensors").unlink()
    answers = Sampled()
    after = rollouts(tmp_path, answers)
    for step in (1, 2, 3):
        after.take(step, 3 * (step - 1), Timers())
    assert [version for version, _ in answers.asked] == ["1", "2"]


def test_a_disk_that_is_full_costs_the_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "write_bytes", full)
    with caplog.at_level(logging.ERROR, logger.name):
        assert len(rollouts(tmp_path, Sampled()).take(1, 0, Timers()).sequences) == 6
    assert "No space left on device" in caplog.text and not list(tmp_path.glob("*.safetensors"))


def test_old_records_go_when_a_checkpoint_has_their_steps(tmp_path: Path) -> None:
    config = settings(rollout__keep_records=1)
    taken = rollouts(tmp_path, Sampled(), config)
    for step in range(1, 5):
        taken.take(step, 3 * (step - 1), Timers())
    taken.prune(3)
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["00000003", "00000004"]
    rollouts(tmp_path, Sampled()).prune(4)  # by default they stay
    replayed = settings(rollout__keep_records=1, rollout__replay=tmp_path)
    Rollouts(replayed, None, None, (1,), VOCABULARY, tmp_path).prune(4)  # and where they are what is trained on
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
