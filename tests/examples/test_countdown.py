"""The demo's task, its data, what is computed of a model exactly, and the recipes of the examples."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from examples.countdown import commands
from examples.countdown.compare import settings_of
from examples.countdown.exact import measures
from examples.countdown.methods import METHODS
from examples.countdown.prepare import prepare
from examples.countdown.task import (
    CARELESS,
    PIECES,
    STYLES,
    Problem,
    grade,
    problems,
    response_row_of,
    split,
    style_of,
    without_last_number,
    writing_of,
)
from megatron_flowrl.config import check_config, load_config
from megatron_flowrl.data.tokenizer import load_tokenizer
from megatron_flowrl.rewards.grader import Item

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def all_problems() -> list[Problem]:
    """Every problem."""
    return problems()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo begins with."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(folder, seed=0)
    return folder


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_writings_of_a_problem(all_problems: list[Problem]) -> None:
    (found,) = [problem for problem in all_problems if (problem.numbers, problem.target) == ((1, 1, 1, 1), 2)]
    assert found.writings == (
        "1+1+1-1", "1+1-(1-1)", "1+1-1+1", "1-(1-(1+1))", "1-(1-1)+1", "1-(1-1-1)", "1-1+1+1",
    )  # fmt: skip
    assert len({(problem.numbers, problem.target) for problem in all_problems}) == len(all_problems)


def test_problems_take_away_one_number_at_most(all_problems: list[Problem]) -> None:
    targets = {problem.target for problem in all_problems if problem.numbers == (1, 2, 4, 10)}
    assert targets == {17, 15, 13, 9}  # less twice a number; 7 is reached by 10+2-1-4 too, but 17 - 2 x 10 is negative


def test_every_writing_is_right_and_a_key_of_its_own(folder: Path) -> None:
    for row in rows_of(folder / "test.jsonl")[:60]:
        items = [Item(writing, row["ground_truth"], row=row) for writing in row["writings"]]
        worth = [1.1 if style_of(writing) == "rising" else 1.0 for writing in row["writings"]]
        assert [(one.score, one.key) for one in grade(items)] == [*zip(worth, row["writings"], strict=True)]
        assert row["num_solutions"] == len(row["writings"]) >= 4


@pytest.mark.parametrize(
    ("text", "writing"),
    [("(2+3)+4", "2+3+4"), ("2-(3-4)", "2-(3-4)"), ("2+(3-4)", "2+3-4"), ("(2-3)-4", "2-3-4"), (" 2 + 3", "2+3"),
     ("-2+3", None), ("2*3", None), ("2+", None), ("f(2)", None), ("2**3", None), ("(" * 5000, None)],
)  # fmt: skip
def test_brackets_that_change_nothing_are_no_writing_of_their_own(text: str, writing: str | None) -> None:
    assert writing_of(text) == writing


def test_a_wrong_answer_is_worth_nothing() -> None:
    row = {"writings": ["2+3+4-1"]}
    wrong, odd = grade([Item(text, {"numbers": [1, 2, 3, 4], "target": 8}, row=row) for text in ("2+3+4+1", "-1+5+4")])
    assert wrong.score == odd.score == 0.0 and wrong.key is None


def test_what_follows_an_equals_sign_does_not_count() -> None:
    row = {"writings": ["12+1-1+1"]}
    (one,) = grade([Item("12+1-1+1=13", {"numbers": [1, 1, 1, 12], "target": 13}, row=row)])
    assert (one.score, one.key) == (1.0, "12+1-1+1")


def test_data_of_another_task_is_not_taken_up(folder: Path, tmp_path: Path) -> None:
    commands.prepare(folder)  # what is there is of this one
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "prepared.json").write_text("{}")
    with pytest.raises(SystemExit, match="was made for another form of the task: delete"):
        commands.prepare(tmp_path / "data")


def test_splits_share_no_problem(all_problems: list[Problem], folder: Path) -> None:
    parts = split(all_problems, 0)
    assert sum(map(len, parts.values())) == len({problem for part in parts.values() for problem in part})
    held_out = {(p.numbers, p.target) for name in ("validation", "test") for p in parts[name]}
    shown = set()
    for row in rows_of(folder / "sft.jsonl"):
        *numbers, _, target, _ = row["prompt"].split()
        shown.add((tuple(sorted(map(int, numbers))), int(target)))
    assert shown and not shown & held_out


def test_responses_are_unequal_in_style(all_problems: list[Problem]) -> None:
    (problem,) = [one for one in all_problems if (one.numbers, one.target) == ((2, 3, 4, 5), 14)]
    chance, counts = random.Random(1), Counter[str]()
    for _ in range(3000):
        counts[response_row_of(problem, chance)["response"]] += 1
    right = {writing: count for writing, count in counts.items() if writing in problem.writings}
    assert set(right) == set(problem.writings) and len(right) == 24
    expected = {writing: STYLES[style_of(writing)] / 33 for writing in right}  # 8 + 3 + 22 x 1
    assert all(right[w] / sum(right.values()) == pytest.approx(share, abs=0.04) for w, share in expected.items())


def test_some_responses_are_careless(all_problems: list[Problem]) -> None:
    (problem,) = [one for one in all_problems if (one.numbers, one.target) == ((2, 3, 4, 5), 10)]
    chance = random.Random(1)
    rows = [response_row_of(problem, chance) for _ in range(3000)]
    wrong = [row["response"] for row in rows if row["response"] not in problem.writings]
    assert set(wrong) <= {without_last_number(writing) for writing in problem.writings}
    assert {row["prompt"].split(" = ")[1] for row in rows} == {f"{problem.target} :"}
    assert len(wrong) / 3000 == pytest.approx(CARELESS, abs=0.03)


@pytest.mark.parametrize(
    ("writing", "without"),
    [("7-2+3+1", "7-2+3"), ("7-(2-3-1)", "7-(2-3)"), ("7-(2-3)", "7-2"), ("7+1-(2-12)", "7+1-2"),
     ("1-(1-(2-3))", "1-(1-2)")],
)  # fmt: skip
def test_without_the_last_number(writing: str, without: str) -> None:
    assert without_last_number(writing) == without


@pytest.mark.parametrize(
    ("writing", "style"),
    [("2+3-12", "rising"), ("12-10-9", "falling"), ("10-2+12", "mixed"), ("3+3+3", "rising"), ("9+12-10", "mixed")],
)
def test_styles(writing: str, style: str) -> None:
    assert style_of(writing) == style


def test_the_tokenizer_and_the_model(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    assert tokenizer.size == len(PIECES)
    for row in rows_of(folder / "sft.jsonl")[:200]:
        tokens = tokenizer.encode(row["prompt"] + row["response"], True)
        assert 0 not in tokens and tokenizer.decode(tokens) == (row["prompt"] + row["response"]).replace(" ", "")
    weights = load_file(folder / "model" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (len(PIECES), 128)


def test_exact_measures() -> None:
    start = [[math.log(0.2), math.log(0.1)]]
    equal, unequal = [[1.0, 1.0]], [[1.5, 1.0]]
    z = 0.3 * math.exp(2.0) + 0.7
    target = [[math.log(0.2 * math.exp(2.0) / z), math.log(0.1 * math.exp(2.0) / z)]]
    found = measures(target, start, equal, beta=2.0)
    assert found["kl"] == pytest.approx(0.0, abs=1e-12)
    assert found["entropy"] == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3)
    before = measures(start, start, equal, beta=2.0)
    assert before["kl"] == pytest.approx(math.log(z) - 2.0 * 0.3) and before["mass"] == pytest.approx(0.3)
    z = 0.2 * math.exp(3.0) + 0.1 * math.exp(2.0) + 0.7
    target = [[math.log(0.2 * math.exp(3.0) / z), math.log(0.1 * math.exp(2.0) / z)]]
    assert measures(target, start, unequal, beta=2.0)["kl"] == pytest.approx(0.0, abs=1e-12)
    assert measures(start, start, unequal, beta=2.0)["kl"] == pytest.approx(math.log(z) - 0.2 * 3.0 - 0.1 * 2.0)


@pytest.mark.parametrize(
    "recipe", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_recipes_are_good(recipe: Path) -> None:
    check_config(load_config(recipe, ["model.path=model", "evaluation.path=test.jsonl"]))


def test_what_the_user_sets_counts_for_every_run() -> None:
    settings = settings_of("flowrl_exact", 2, ["flowrl.beta=3", "run.steps=7"])
    assert {"objective.preset=exact", "flowrl.beta=3", "seed=2", "run.steps=7"} <= {*settings}
    assert len({setting.partition("=")[0] for setting in settings}) == len(settings)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_good(name: str) -> None:
    given = ["model.path=model", "evaluation.path=test.jsonl", *METHODS[name]]
    check_config(load_config(EXAMPLES / "countdown" / "train.yaml", given))
