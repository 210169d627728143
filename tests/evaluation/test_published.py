"""Rows as data sets of the hub have them: what becomes of them, what is left out, and what is refused."""

from __future__ import annotations

import base64
import datetime
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.config import UserError
from megatron_flowrl.data.rows import BadRow
from megatron_flowrl.evaluation.benchmarks import Part, benchmark_of, read_problems
from megatron_flowrl.evaluation.published import answered, codeforces, date_of, livecodebench, mathematics, programs
from tests.tiny_tasks import write_rows


def packed(content: object) -> str:
    return zipped(pickle.dumps(content))


def zipped(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def lcb(kind: str = "stdin", **more: Any) -> dict[str, Any]:
    shown = [{"input": "1 2\n", "output": "3\n", "testtype": kind}]
    hidden = [{"input": "2 2\n", "output": "4\n", "testtype": kind}]
    if kind == "functional":
        shown = [{"input": '[1, 2]\n"a"', "output": "[1, 2]", "testtype": kind}]
        hidden = [{"input": "[3]\nnull", "output": "true", "testtype": kind}]
    row = {
        "question_id": "abc_1",
        "question_content": "Add them.",
        "contest_date": "2024-09-07T00:00:00",
        "starter_code": "class Solution:\n    def add(self, a, b):\n        " if kind == "functional" else "",
        "public_test_cases": json.dumps(shown),
        "private_test_cases": packed(json.dumps(hidden)),
        "metadata": json.dumps({"func_name": "add"} if kind == "functional" else {}),
    }
    return {**row, **more}


def test_programs_of_livecodebench_that_read_and_write(tmp_path: Path) -> None:
    (problem,) = read_problems(benchmark_of("livecodebench"), str(write_rows(tmp_path / "rows.jsonl", [lcb()])))
    assert problem.id == "abc_1"
    assert problem.ground_truth.pop("prelude").startswith("import bisect")
    assert problem.ground_truth == {"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"]}
    assert problem.prompt.startswith("Add them.\n\nWrite a Python program that reads from standard input")
    assert not {"inputs", "private_test_cases"} & {*problem.row}  # once is enough


def test_functions_of_livecodebench(tmp_path: Path) -> None:
    rows = [lcb("functional", private_test_cases=json.dumps(json.loads(lcb("functional")["public_test_cases"])))]
    (plain,) = read_problems(benchmark_of("livecodebench"), str(write_rows(tmp_path / "plain.jsonl", rows)))
    assert len(plain.ground_truth["calls"]) == 2
    rows = [lcb("functional")]
    (problem,) = read_problems(benchmark_of("livecodebench"), str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert problem.ground_truth.pop("prelude").startswith("import bisect")
    assert problem.ground_truth == {
        "entry_point": "Solution.add",
        "calls": [{"args": [[1, 2], "a"], "expected": [1, 2]}, {"args": [[3], None], "expected": True}],
    }
    assert "```python\nclass Solution:\n    def add(self, a, b):" in problem.prompt
    assert "Write it in Python, with the names that are given" in problem.prompt


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/pickle-was-run",)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"private_test_cases": packed(Harm())}, "a pickle with STACK_GLOBAL, where text is all that is wanted"),
        ({"private_test_cases": packed([1])}, "a pickle with EMPTY_LIST"),
        ({"private_test_cases": zipped(b"X\x01\x00\x00\x00ar\xff\xff\xff\x7f.")}, "not JSON|cannot be read"),
        ({"private_test_cases": zipped(b"X\x01\x00\x00\x00aX\x01\x00\x00\x00b.")}, "a pickle of 2 texts"),
        ({"private_test_cases": "[" * 100_000}, "cannot be read: RecursionError"),
        ({"private_test_cases": "no base64!"}, "private_test_cases cannot be read"),
        ({"public_test_cases": "[{}]"}, "public_test_cases cannot be read: KeyError"),
        ({"public_test_cases": '[{"input": 1, "output": "x"}]'}, "input and output have to be text"),
        ({"public_test_cases": "", "private_test_cases": ""}, "it has no tests"),
        ({"public_test_cases": '[{"input": "1", "output": "x", "testtype": "other"}]'}, "of the kinds other, stdin"),
        ({**lcb("functional"), "metadata": "{}"}, "metadata has no func_name"),
        ({**lcb("functional"), "metadata": None}, "metadata has no func_name"),
        (
            {**lcb("functional"), "public_test_cases": '[{"input": "x y", "output": "1", "testtype": "functional"}]'},
            "a test has 'x y', which is no JSON",
        ),
    ],
)
def test_what_is_no_row_of_livecodebench(more: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        livecodebench({**lcb(), **more})
    assert not Path("/tmp/pickle-was-run").exists()


def test_more_than_a_problem_s_tests_can_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_flowrl.evaluation.published._LARGEST", 10_000)
    bomb = zipped(b" " * 1_000_000)
    assert len(bomb) < 2000
    with pytest.raises(BadRow, match="more than 10000 bytes"):
        livecodebench(lcb(private_test_cases=bomb))


def test_problems_of_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dates = ("2024-07-31T00:00:00", "2024-08-01T00:00:00", "2025-01-31", "2025-02-01T00:00:00")
    rows = [lcb(question_id=date, contest_date=date) for date in dates]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    found = read_problems(benchmark_of("livecodebench"), file, Part(since="2024-08-01", until="2025-02-01"))
    assert [problem.id for problem in found] == [*dates[1:3]]
    assert "2 problems are left out: it is of another time" in caplog.text
    found = read_problems(benchmark_of("livecodebench"), file, Part(limit=1, since="2025-01-01"))
    assert [problem.id for problem in found] == [dates[2]]  # so many problems, not so many rows
    with pytest.raises(UserError, match=r"no problem of .* is left"):
        read_problems(benchmark_of("livecodebench"), file, Part(since="2026-01-01"))
    file = str(write_rows(tmp_path / "math.jsonl", [{"problem": "1 + 1", "answer": "2"}]))
    with pytest.raises(UserError, match="it has no date"):
        read_problems(benchmark_of("math500"), file, Part(since="2026-01-01"))


def test_dates_as_files_have_them() -> None:
    assert date_of({"contest_date": datetime.datetime(2024, 9, 7, 23)}) == "2024-09-07"
    assert date_of({"date": datetime.date(2024, 9, 7)}) == "2024-09-07"
    assert date_of({"contest_start": 1725667200}) == "2024-09-07"
    assert date_of({"date": "2024-09-07T01:02:03"}) == "2024-09-07" and date_of({"date": None}) is None
    for text in ("09/07/2024", "2024-9-7", "2024-09-077"):
        with pytest.raises(BadRow, match="which is no date such as 2024-08-31"):
            date_of({"date": text})


CODEFORCES = {
    "id": "2000/A",
    "contest_id": "2000",
    "index": "A",
    "title": "Sums",
    "description": "Add.",
    "input_format": "Two numbers.",
    "output_format": "Their sum.",
    "note": "Mind the sign.",
    "examples": [{"input": "1 2\n", "output": "3\n"}],
    "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "0 0\n", "output": "0\n"}],
    "generated_checker": None,
    "interaction_format": None,
    "input_mode": "stdio",
}


def test_codeforces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others: list[dict[str, Any]] = [
        {"generated_checker": "def check(): ..."},
        {"generated_checker": "another"},
        {"interaction_format": "Ask."},
        {"input_mode": "file"},
        {"official_tests": []},
    ]
    rows = [CODEFORCES, *({**CODEFORCES, "id": str(number), **other} for number, other in enumerate(others))]
    (problem,) = read_problems(benchmark_of("codeforces"), str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert problem.ground_truth == {"inputs": ["1 2\n", "0 0\n"], "outputs": ["3\n", "0\n"]}
    assert (problem.row["contest"], problem.row["index"]) == ("2000", "A")
    assert problem.prompt.startswith(
        "Sums\n\nAdd.\n\nInput\n\nTwo numbers.\n\nOutput\n\nTheir sum.\n\n"
        "Example\n\nInput:\n1 2\n\nOutput:\n3\n\nNote\n\nMind the sign.\n\nWrite a Python program"
    )
    assert "2 problems are left out: more than one output is right" in caplog.text
    for reason in ("it is interactive", "it reads and writes files", "it has no official tests"):
        assert f"1 problem is left out: {reason}" in caplog.text
    rows = [{**CODEFORCES, "official_tests_complete": False}]
    read_problems(benchmark_of("codeforces"), str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert "of 1 problems only a part of the official tests is there" in caplog.text


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ('{"input": "1"}', "cannot be read"),
        ({"input": ["1"], "output": ["2"]}, "no list of tests"),
        ([{"input": "1"}], "KeyError: 'output'"),
        ([{"input": None, "output": "1"}], "input and output have to be text"),
    ],
)
def test_what_are_no_tests_of_codeforces(tests: object, message: str) -> None:
    for column in ("official_tests", "examples"):
        with pytest.raises(BadRow, match=message):
            codeforces({**CODEFORCES, column: tests})


def test_a_description_of_ones_own_does_no_harm() -> None:
    row = {"problem": "Add.", "description": "mine", "inputs": ["1"], "outputs": ["1"]}
    assert codeforces(row) == programs(row) == row


def test_programs_of_ones_own_in_any_form() -> None:
    assert programs(lcb())["outputs"] == ["3\n", "4\n"] and programs(CODEFORCES)["contest"] == "2000"
    tests = {"inputs": ["1"], "outputs": ["1"]}
    for row in ({"ground_truth": json.dumps(tests)}, {"reward_model": {"ground_truth": tests}}):
        assert programs({"prompt": "x", **row})["inputs"] == ["1"]
    for truth, message in (("no json", "is no JSON"), ("[1]", "it has no tests")):
        with pytest.raises(BadRow, match=message):
            programs({"prompt": "x", "ground_truth": truth})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": "4"}, "4"),
        ({"answer": ["4"]}, "4"),
        ({"final_answer": ["3", "4"]}, "3, 4"),
        ({"answer": "He has 1,000.\n#### 1,000"}, "1000"),
        ({"reward_model": {"ground_truth": "7", "style": "rule"}}, "7"),
        ({"answer": 4}, 4),
        ({"answer": None, "final_answer": ["5"]}, "5"),
    ],
)
def test_answers_of_mathematics(row: dict[str, Any], answer: object) -> None:
    assert mathematics(row)["answer"] == answer


def test_for_other_graders_answers_stay_as_they_are() -> None:
    several = ["Paris", "paris, France"]
    assert answered({"answer": several})["answer"] == several
    assert answered({"answer": "see #### 1,5"})["answer"] == "see #### 1,5"


def test_a_context_goes_before_its_question() -> None:
    row = {"answer": "1", "question": "How many?", "context": " There are some. "}
    assert mathematics(row)["question"] == "There are some.\nHow many?"
    assert mathematics({**row, "context": None})["question"] == "How many?"
