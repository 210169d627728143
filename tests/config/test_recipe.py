"""Recipes that are layered on others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_flowrl.config import Config, UserError, given_keys, load_config, to_yaml

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe, in a folder where its name has one, and gives its path."""

    def writing(name: str, content: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    return writing


def refused(recipe: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as raised:
        load_config(recipe, overrides)
    return raised.value.problems


def test_three_layers_and_the_command_line(write: Write) -> None:
    write("lowest.yaml", "optimizer: {lr: 1.0, clip_grad: 2.0}\nseed: 1\nreward: {grader: code}")
    write("task/middle.yaml", "base: ../lowest.yaml\noptimizer: {lr: 3.0}\nseed: 2\nreward.grader: exact")
    upper = write("task/deep/upper.yaml", "seed: 3\nbase: ../middle.yaml")
    config = load_config(upper, ["optimizer.weight_decay=0"])
    assert (config.optimizer.lr, config.optimizer.clip_grad, config.optimizer.weight_decay) == (3.0, 2.0, 0.0)
    assert (config.seed, config.reward.grader) == (3, "exact")
    assert given_keys(upper, []) == {"optimizer.lr", "optimizer.clip_grad", "seed", "reward.grader"}


def test_a_list_and_null_take_the_place_of_what_is_below(write: Write) -> None:
    write("below.yaml", "rollout: {extra_arguments: [--a, --b], max_model_len: 5}")
    config = load_config(
        write("above.yaml", "base: below.yaml\nrollout: {extra_arguments: [--c], max_model_len: null}")
    )
    assert config.rollout.extra_arguments == ("--c",) and config.rollout.max_model_len is None


def test_a_preset_above_does_not_undo_a_value_below(write: Write) -> None:
    write("below.yaml", "flowrl: {beta: 3.0}")
    config = load_config(write("above.yaml", "base: below.yaml\nobjective: {preset: paper}"))
    assert (config.flowrl.beta, config.flowrl.reward) == (3.0, "group_norm")


def test_what_is_written_out_has_no_base(write: Write, tmp_path: Path) -> None:
    write("below.yaml", "seed: 7")
    config = load_config(write("above.yaml", "base: below.yaml"))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "moved" / "config.yaml") == config != Config()


def test_a_problem_is_told_with_the_file_that_it_is_in(write: Write) -> None:
    below = write("below.yaml", "\noptimizer: {lr: fast}")
    above = write("above.yaml", "base: below.yaml\nsed: 1")
    problems = refused(above)
    assert problems[0].startswith(f"{below}:2: optimizer.lr = fast: must be float")
    assert problems[1].startswith(f"{above}:2: sed: there is no such key; did you mean seed?")


def test_a_base_that_is_not_there(write: Write, tmp_path: Path) -> None:
    above = write("above.yaml", "seed: 1\nbase: gone.yaml")
    (problem,) = refused(above)
    gone = str(tmp_path / "gone.yaml")
    assert problem == f"{above}:2: base = gone.yaml: recipe {gone!r} cannot be read: No such file or directory"


@pytest.mark.parametrize("content", ["base: 3", "base: null", "base: ''", "base: [a.yaml]", "base: {a: 1}"])
def test_a_base_that_is_no_path(content: str, write: Write) -> None:
    (problem,) = refused(write("above.yaml", content))
    assert "above.yaml:1: base = " in problem and "must be the path of a recipe" in problem


def test_a_circle(write: Write) -> None:
    write("one.yaml", "base: two.yaml")
    write("two.yaml", "base: one.yaml")
    (problem,) = refused(write("upper.yaml", "base: one.yaml"))
    assert "two.yaml:1: base = one.yaml" in problem and "in a circle" in problem
    (problem,) = refused(write("itself.yaml", "base: itself.yaml"))
    assert "in a circle" in problem


def test_base_is_given_once_and_not_on_the_command_line(write: Write) -> None:
    write("below.yaml", "seed: 1")
    (problem,) = refused(write("twice.yaml", "base: below.yaml\nbase: below.yaml"))
    assert "base is given twice" in problem
    (problem,) = refused(write("above.yaml", "base: below.yaml"), "base=other.yaml")
    assert problem == "command line: base is a recipe's: write it in the file that is layered on another"
