"""Graders by name or by dotted path, and what is made of what a user's function returns."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_flowrl.config import RewardConfig, UserError
from megatron_flowrl.rewards.find import BUILT_IN, check_ground_truth, make_grader
from megatron_flowrl.rewards.grader import Grade, Item, bounded_key

HERE = "tests.rewards.graders"


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file own_grader.py in the working directory, which is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "own_grader.py"
    sys.modules.pop("own_grader", None)


def grades_of(given: Any, items: int = 1, monkeypatch: pytest.MonkeyPatch | None = None) -> Sequence[Grade]:
    import tests.rewards.graders as graders

    assert monkeypatch is not None
    monkeypatch.setattr(graders, "stub", lambda items: given, raising=False)
    return make_grader(RewardConfig(grader=f"{HERE}.stub"))([Item("", None)] * items)


def test_a_function_of_ones_own_may_return_floats() -> None:
    grade = make_grader(RewardConfig(grader=f"{HERE}.lengths"))
    assert grade([Item("abc", None), Item("", None)]) == [Grade(3.0), Grade(0.0)]


def test_a_function_is_found_in_the_working_directory(own_module: Path) -> None:
    own_module.write_text("def grade(items):\n    return [len(item.row) for item in items]\n")
    assert make_grader(RewardConfig(grader="own_grader.grade"))([Item("", None, row={"a": 1})]) == [Grade(1.0)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", r"'maths' is none of math, answer_match, .* \(did you mean 'math'\?\); .*package\.module"),
        ("xyz", "'xyz' is none of math, .*, overlong; give one"),
        ("nowhere.at.all", "no module 'nowhere' in the working directory .* built-in graders are math, answer_match"),
        ("rewards.countdwon", r"no module 'rewards' .*did you mean 'countdown'"),
        ("tests.rewards.grader.by_word", "no module 'tests.rewards.grader'"),
        (f"{HERE}.by_wort", r"has no 'by_wort' \(did you mean 'by_word'\?\)"),
        (f"{HERE}.not_callable", "is of type int; name a function"),
        (f"{HERE}.Stateful", "is of type type; name a function"),
        ("own_grader.grade", "no module 'own_grader'"),
        (".grade", "does not import"),
    ],
)
def test_what_names_no_grader_is_refused(name: str, message: str, own_module: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_grader(RewardConfig(grader=name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import a_package_that_is_missing", "No module named 'a_package_that_is_missing'; install it"),
        ("def grade(:", "does not import: SyntaxError"),
        ("1 / 0", "does not import: ZeroDivisionError: division by zero; mend it"),
    ],
)
def test_a_module_that_does_not_import_is_refused(content: str, message: str, own_module: Path) -> None:
    own_module.write_text(content)
    with pytest.raises(UserError, match=message):
        make_grader(RewardConfig(grader="own_grader.grade"))


@pytest.mark.parametrize("name", ["math", "reasoning_gym"])
def test_a_library_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}[name]
    monkeypatch.setitem(sys.modules, library, None)
    extra = name.replace("_", "-")
    with pytest.raises(UserError, match=rf"needs .*pip install -e '.\[{extra}\]'"):
        make_grader(RewardConfig(grader=name))
    assert (
        check_ground_truth(name, {"answer": "1", "metadata": {"source_dataset": "x"}} if extra != name else "1") is None
    )


@pytest.mark.parametrize(
    "score", [1, True, np.float32(1.0), np.int64(1), np.array(1.0), Grade(1.0), Grade(np.float64(1.0))]
)  # type: ignore[arg-type]
def test_numbers_of_all_kinds_are_scores(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grades = grades_of([score], monkeypatch=monkeypatch)
    assert grades == [Grade(1.0)] and type(grades[0].score) is float


@pytest.mark.parametrize(
    "score", [math.nan, math.inf, -math.inf, None, "1.0", [1.0], 10**400, np.array([1.0, 2.0]), Grade(math.nan), 1j]
)
def test_what_is_no_finite_number_is_a_problem(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (grade,) = grades_of([score], monkeypatch=monkeypatch)
    assert grade.score == 0.0 and grade.problem is not None and "is not a finite number" in grade.problem


@pytest.mark.parametrize("given", [[], [1.0, 1.0, 1.0], 1.0, None, "12"])
def test_another_number_of_scores_is_an_error(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the grader returned"):
        grades_of(given, items=2, monkeypatch=monkeypatch)


def test_arrays_and_iterators_are_batches_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grades_of(np.array([1.0, 0.5]), 2, monkeypatch) == [Grade(1.0), Grade(0.5)]
    assert grades_of(iter([Grade(1.0, "k"), 0.5]), 2, monkeypatch) == [Grade(1.0, "k"), Grade(0.5)]


def test_a_problem_and_a_long_key_stay() -> None:
    long = "x" * 1000
    assert bounded_key("short") == "short" and len(bounded_key(long)) < 200
    assert bounded_key(long) != bounded_key(long + "x") and bounded_key("\ud800" * 999)


@pytest.mark.parametrize("name", [*BUILT_IN, f"{HERE}.by_word"])
def test_ground_truths_are_checked_without_grading(name: str) -> None:
    of_code = {"inputs": [""], "outputs": [""]}
    good = {"countdown": {"numbers": [1], "target": 1}, "choice": "A", "code": of_code}.get(name, "1")
    assert check_ground_truth(name, good if name != "reasoning_gym" else None) is None
