"""Public data sets' rows, made here in their forms, as prompts that a run can be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from examples.code import prepare as code
from examples.math import prepare as math
from megatron_flowrl.config import PromptsConfig, RewardConfig
from megatron_flowrl.data.prompts import Limits, load_prompts
from megatron_flowrl.rewards.answer_match import make
from megatron_flowrl.rewards.find import check_ground_truth
from megatron_flowrl.rewards.grader import Item
from tests.tiny_tasks import write_rows

BEFORE, AFTER = "Solve it step by step.\nThe last line is Answer: $Answer.\n\n", '\n\nRemember "Answer:".'


def dapo(problem: str, answer: Any) -> dict[str, Any]:
    content = f"{BEFORE}{problem}{AFTER}"
    return {"prompt": [{"role": "user", "content": content}], "reward_model": {"ground_truth": answer}}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(main: Any, arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


class TestMath:
    def test_each_problem_once_and_held_out_ones_in_the_same_words(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [dapo("What is 1 + 1?", "2"), dapo("How\nmany?", "5"), dapo("Which?", "7"), dapo("Why?", 4)]
        rows += [rows[0], rows[0], dapo("Which?", "8"), dapo("Seen?", "1")]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:3] + rows[4:]), tmp_path / "train.parquet")
        more = write_rows(tmp_path / "more.jsonl", [rows[3]])
        held_out = write_rows(
            tmp_path / "test.jsonl",
            [{"problem": "Seen?", "answer": 1}, {"question": "New? ", "answer": "#### 1,204"}],
        )
        given = [tmp_path / "out", "--train", tmp_path / "train.parquet", more, "--held-out", held_out]
        math.main([str(one) for one in given])
        found = read(tmp_path / "out" / "train.jsonl")
        assert [row["ground_truth"] for row in found] == ["2", "5", "4"]
        assert found[1]["prompt"] == [{"role": "user", "content": f"{BEFORE}How\nmany?{AFTER}"}]
        kept_back = read(tmp_path / "out" / "held_out.jsonl")
        assert [(row["prompt"][0]["content"], row["ground_truth"]) for row in kept_back] == [
            (f"{BEFORE}Seen?{AFTER}", "1"),
            (f"{BEFORE}New?{AFTER}", "1204"),
        ]
        said = capsys.readouterr().out
        assert "3 problems" in said and "left out 3: it was there before" in said
        assert "left out 1: it comes with two answers" in said and "left out 1: it is held out" in said
        assert f"put between {BEFORE!r} and {AFTER!r}" in said

    def test_held_out_problems_do_not_lose_their_instructions(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [dapo("What is 1 + 1?", "2"), {"prompt": "A stray one.", "answer": 1}, dapo("And 1 + 2?", "3")]
        source = write_rows(tmp_path / "rows.jsonl", rows)
        held_out = write_rows(tmp_path / "test.jsonl", [{"problem": "New?", "answer": 1}])
        given = [tmp_path / "out", "--train", source, "--held-out", held_out]
        said = refused(math.main, given, capsys)
        assert "no common first or last lines" in said and "such as 'A stray one.'" in said and "--bare" in said
        assert not (tmp_path / "out").exists()
        math.main([str(one) for one in [*given, "--bare"]])
        assert read(tmp_path / "out" / "held_out.jsonl")[0]["prompt"][0]["content"] == "New?"
        math.main([str(one) for one in given[:3]])  # without --held-out nothing is put between them
        assert len(read(tmp_path / "out" / "train.jsonl")) == 3

    def test_what_is_written_can_be_trained_on(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "rows.jsonl", [dapo("What is 1 + 1?", "2"), dapo("And 1 + 2?", "3")])
        math.main([str(tmp_path), "--train", str(source)])

        class Words:
            name, size = "words", 100

            def chat(self, messages: list[dict[str, str]]) -> list[int]:
                return [len(word) for word in messages[0]["content"].split()]

        prompts = load_prompts(
            PromptsConfig(),
            setting="prompts.path",
            path=str(tmp_path / "train.jsonl"),
            split="train",
            limit=None,
            tokenizer=Words,
            limits=Limits(100, 200),
            max_answer_tokens=10,
            answer_setting="generation.max_tokens",
            check=lambda truth, row: check_ground_truth("answer_match", truth, row),
        ).prompts
        assert [prompt.ground_truth for prompt in prompts] == ["2", "3"]
        grades = make(RewardConfig(grader="answer_match"))([Item("So it is.\nAnswer: 2", prompts[0].ground_truth)])
        assert [grade.score for grade in grades] == [1.0]

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ({"prompt": 3, "answer": 1}, "prompt = 3 is neither text nor one message"),
            ({"prompt": [], "answer": 1}, "prompt = [] is neither"),
            ({"prompt": "x"}, "reward_model.ground_truth are missing"),
            ({"prompt": "x", "answer": True}, "the answer True is neither text nor a number"),
            ({"prompt": "x", "answer": " "}, "the answer ' ' is neither"),
        ],
    )
    def test_bad_rows_are_named(
        self, row: Any, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_rows(tmp_path / "rows.jsonl", [dapo("What is 1 + 1?", "2"), row])
        said = refused(math.main, [tmp_path, "--train", source], capsys)
        assert f"{source}:2: " in said and problem in said and not (tmp_path / "train.jsonl").exists()
        math.main([str(tmp_path), "--train", str(source), "--leave-out-bad-rows"])
        assert "left out 1: it cannot be read" in capsys.readouterr().out

    def test_files_that_are_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "does not exist" in refused(math.main, [tmp_path, "--train", tmp_path / "gone.parquet"], capsys)
        (tmp_path / "file").touch()
        source = write_rows(tmp_path / "rows.jsonl", [dapo("What?", "2")])
        assert "cannot be written" in refused(math.main, [tmp_path / "file" / "x", "--train", source], capsys)


def problem(tests: Any, **more: Any) -> dict[str, Any]:
    return {"problem": " Add the numbers. ", "tests": json.dumps(tests), **more}


TACO = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
TACO_CALLED = {"inputs": [[1, 2], [[3], 4]], "outputs": [[3], [[7, 8]]], "fn_name": "add"}
PRIME = [{"input": ["1", "2"], "output": "3", "type": "stdin_stdout"}]
PRIME_CALLED = [{"input": [1, 2], "output": [3], "type": "function_call", "fn_name": "add"}]
LIVE = [{"input": '1\n"two"', "output": "[3]", "testtype": "functional", "metadata": {"func_name": "add"}}]
FORCES = [{"input": "1 2", "output": "3"}]


class TestCode:
    @pytest.mark.parametrize(
        ("row", "truth"),
        [
            (problem(TACO), {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}),
            (
                problem(TACO_CALLED),
                {
                    "entry_point": "add",
                    "calls": [{"args": [1, 2], "expected": 3}, {"args": [[3], 4], "expected": [7, 8]}],
                },
            ),
            (problem(PRIME), {"inputs": ["1\n2"], "outputs": ["3"]}),
            (problem(PRIME_CALLED), {"entry_point": "add", "calls": [{"args": [1, 2], "expected": 3}]}),
            (
                problem(LIVE, starter_code="class Solution:\n    def add(self, a, b):\n"),
                {"entry_point": "Solution.add", "calls": [{"args": [1, "two"], "expected": [3]}]},
            ),
            (problem(FORCES), {"inputs": ["1 2"], "outputs": ["3"]}),
        ],
    )
    def test_every_part_of_the_data_set(self, row: Any, truth: Any) -> None:
        made = code.code_row(row, most=15)
        assert made["ground_truth"] == truth and check_ground_truth("code", truth) is None
        assert made["prompt"].startswith("Add the numbers.") and "```python" in made["prompt"]
        assert ("standard input" in made["prompt"]) == ("inputs" in truth)
        assert ("class Solution" in made["prompt"]) == ("starter_code" in row)

    def test_the_tests_with_the_longest_inputs_are_kept_in_their_order(self) -> None:
        tests = {"inputs": ["1", "333", "22", "4444"], "outputs": ["a", "b", "c", "d"]}
        truth = code.code_row(problem(tests), most=2)["ground_truth"]
        assert truth == {"inputs": ["333", "4444"], "outputs": ["b", "d"]}

    def test_a_file_of_problems_once_each(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [problem(TACO), problem([]), problem(TACO), problem(PRIME_CALLED), {**problem(TACO), "problem": "Other"}]
        source = write_rows(tmp_path / "rows.jsonl", rows)
        code.main([str(tmp_path / "train.jsonl"), str(source), "--limit", "2"])
        found = read(tmp_path / "train.jsonl")
        assert [sorted(row["ground_truth"]) for row in found] == [["inputs", "outputs"], ["calls", "entry_point"]]
        said = capsys.readouterr().out
        assert "2 problems, of which 1 ask for a function" in said
        assert "left out 1: it has no tests" in said and "left out 1: it was there before" in said

    @pytest.mark.parametrize(
        ("row", "what"),
        [
            ({"problem": 3, "tests": "[]"}, "problem = 3 is no text"),
            ({"problem": "x", "tests": "[{"}, "is no JSON"),
            (problem(3), "tests = 3 is neither a list nor inputs and outputs"),
            (problem({"inputs": ["1"], "outputs": []}), "no inputs and outputs, as many of each"),
            (problem([{"input": "1"}]), "tests[0] = {'input': '1'} has no input and output"),
            (problem([{"input": "1", "output": "2", "type": "checker"}]), "of the kind 'checker'; known are stdin"),
            (problem([{**PRIME_CALLED[0], "fn_name": None}]), "calls a function, and has no name for it"),
            (problem([{**PRIME_CALLED[0], "input": 1}]), "tests[0].input = 1 is no list of arguments"),
            (problem([{**LIVE[0], "input": "{"}]), "tests[0].input = '{' is no JSON"),
            (problem([{"input": 1, "output": "2"}]), "input = 1 is no text"),
            (problem([*PRIME_CALLED, *PRIME]), "its tests are for None, add"),
        ],
    )
    def test_bad_rows_are_named(self, row: Any, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = write_rows(tmp_path / "rows.jsonl", [problem(TACO), row])
        said = refused(code.main, [tmp_path / "train.jsonl", source], capsys)
        assert f"{source}:2: " in said and what in said
        code.main([str(tmp_path / "train.jsonl"), str(source), "--leave-out-bad-rows"])
        assert "1 problems" in capsys.readouterr().out
