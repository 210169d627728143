"""`megatron-flowrl evaluate` against a stand-in for a chat server: what is asked, graded, kept, and gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.cli import main
from megatron_flowrl.evaluation.benchmarks import BENCHMARKS, benchmark_of, read_problems
from megatron_flowrl.evaluation.results import GradedText, summarize
from tests.evaluation.conftest import Chat
from tests.tiny_models import save_model

pytestmark = pytest.mark.usefixtures("process_as_it_was")

ROWS = [{"id": "a", "problem": "1 + 1", "answer": "2"}, {"id": "b", "problem": "1 / 2", "answer": "\\frac{1}{2}"}]


def rows_file(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def run(url: str, folder: Path, *more: str) -> dict[str, Any]:
    data = f"math500={rows_file(folder)}"
    given = ["--data", data, "--server", url, "--served-model", "m", "--output", str(folder / "out"), *more]
    retries = [] if any("max_retries" in text for text in more) else ["generation.max_retries=0"]
    main(["evaluate", "math500", *given, "reward.workers=1", *retries])
    summary: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return summary


def test_numbers_of_answers(chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    behind, url = chat
    found = run(url, tmp_path, "--n", "4")["benchmarks"]["math500"]
    assert (found["problems"], found["n"], found["avg"]) == (2, 4, 0.75)
    assert found["pass@1"] == 0.75 and found["pass@2"] == pytest.approx((1 + 5 / 6) / 2) and found["pass@4"] == 1.0
    assert found["maj@4"] == 0.75  # 0.5 and 7 have two votes each
    assert found["avg_interval"] == [0.5, 1.0]
    assert found["tokens_mean"] == 5 and found["truncated_share"] == 0.25 and found["ungraded_share"] == 0.0
    assert found["distinct_finals"] == 1.5
    assert "| math500 | 2 | 75.0 (50.0 - 100.0) |" in capsys.readouterr().out
    assert len(behind.asked) == 8
    (body,) = {json.dumps({**body, "messages": None}) for body in behind.asked}
    wanted = {"model": "m", "max_tokens": 8192, "temperature": 0.6, "top_p": 0.95, "messages": None}
    assert json.loads(body) == wanted
    assert behind.asked[0]["messages"][0]["content"].endswith("put your final answer within \\boxed{}.")
    lines = [json.loads(line) for line in (tmp_path / "out" / "math500.jsonl").read_text().splitlines()]
    assert {(line["id"], line["sample"]) for line in lines} == {(i, s) for i in "ab" for s in range(4)}
    assert {line["key"] for line in lines} == {"2", "1/2", "7"}


def test_what_was_cut_off_goes_on(chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    behind, url = chat
    behind.fail_from = 3
    with pytest.raises(SystemExit):
        run(url, tmp_path, "--n", "4", "rollout.max_num_seqs=1")
    assert "status 500" in capsys.readouterr().err
    file = tmp_path / "out" / "math500.jsonl"
    kept = file.read_text()
    assert len(kept.splitlines()) == 3
    file.write_text(kept + '{"id": "a", "sam')  # as where the process ended in the midst of a line
    behind.fail_from = None
    asked = len(behind.asked)
    assert run(url, tmp_path, "--n", "4")["benchmarks"]["math500"]["n"] == 4
    assert len(behind.asked) - asked == 8 - len(kept.splitlines())
    assert file.read_text().startswith(kept) and len(file.read_text().splitlines()) == 8
    asked = len(behind.asked)
    run(url, tmp_path, "--n", "4")
    assert len(behind.asked) == asked  # all is there
    with pytest.raises(SystemExit):
        run(url, tmp_path, "--n", "5")
    assert "has answers of another evaluation (n = 4); give another --output" in capsys.readouterr().err
    rows_file(tmp_path, [{**ROWS[0], "problem": "1 + 2"}, ROWS[1]])
    with pytest.raises(SystemExit):
        where = ["--data", f"math500={tmp_path / 'rows.jsonl'}", "--output", str(tmp_path / "out")]
        main(["evaluate", "math500", *where, "--server", url, "--served-model", "m", "--n", "4"])
    assert "has answers of another evaluation (other problems of math500)" in capsys.readouterr().err


def test_what_a_server_refuses_is_counted_and_the_rest_goes_on(chat: tuple[Chat, str], tmp_path: Path) -> None:
    behind, url = chat
    behind.statuses = [400, 429]  # one refusal for good, and one that is worth another attempt
    found = run(url, tmp_path, "--n", "2", "generation.max_retries=2")["benchmarks"]["math500"]
    assert found["ungraded_share"] == 0.25 and len(behind.asked) == 5
    lines = [json.loads(line) for line in (tmp_path / "out" / "math500.jsonl").read_text().splitlines()]
    (refused,) = [line for line in lines if line["problem"] is not None]
    assert "refused: " in refused["problem"] and "HTTP status 400" in refused["problem"] and refused["score"] == 0.0


def test_a_name_that_the_server_does_not_know_ends_it(
    chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind, url = chat
    behind.statuses = [404] * 100
    with pytest.raises(SystemExit):
        run(url, tmp_path, "--n", "2")
    assert "is --served-model = 'm' its name, and the key right?" in capsys.readouterr().err
    behind.statuses = []
    assert run(url, tmp_path, "--n", "1")["benchmarks"]["math500"]["avg"] == 1.0


def test_what_was_refused_is_asked_again_and_what_was_not_graded_is_graded_again(
    chat: tuple[Chat, str], tmp_path: Path
) -> None:
    behind, url = chat
    behind.statuses = [400]
    assert run(url, tmp_path, "--n", "1")["benchmarks"]["math500"]["ungraded_share"] == 0.5
    file = tmp_path / "out" / "math500.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["problem"] is None:  # as where its grading had taken too long
            line |= {"problem": "time limit", "score": 0.0, "key": None}
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    asked = len(behind.asked)
    found = run(url, tmp_path, "--n", "1")["benchmarks"]["math500"]
    assert (found["avg"], found["ungraded_share"], len(behind.asked) - asked) == (1.0, 0.0, 1)
    assert len(file.read_text().splitlines()) == 4  # two more, which count
    run(url, tmp_path, "--n", "1")
    assert len(behind.asked) - asked == 1


def test_another_benchmark_in_the_same_folder(chat: tuple[Chat, str], tmp_path: Path) -> None:
    _, url = chat
    run(url, tmp_path, "--n", "1")
    data = f"aime24={rows_file(tmp_path)}"
    given = ["--data", data, "--server", url, "--served-model", "m", "--output", str(tmp_path / "out"), "--n", "1"]
    main(["evaluate", "aime24", *given, "reward.workers=1"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {*summary["benchmarks"]} == {"math500", "aime24"}


def test_a_plan_without_answers_may_be_changed(chat: tuple[Chat, str], tmp_path: Path) -> None:
    behind, url = chat
    behind.fail_from = 0
    with pytest.raises(SystemExit):
        run(url, tmp_path, "--n", "1")
    (tmp_path / "out" / "math500.jsonl").unlink()
    behind.fail_from = None
    assert run(url, tmp_path, "--n", "2")["benchmarks"]["math500"]["n"] == 2


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"problems": 1}'])
def test_settings_that_are_none(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "settings.json").write_text(content)
    (output / "math500.jsonl").write_text("")
    with pytest.raises(SystemExit):
        run("http://x", tmp_path)
    assert "settings.json cannot be read" in capsys.readouterr().err


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit):
        run("http://x", tmp_path)
    assert "out is a file; name a folder" in capsys.readouterr().err


def test_a_rating(chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two attempts, the first of which fails: 500 - 50 points, between the two humans' 600 and 400, at rank 2."""
    behind, url = chat
    behind.says = ["print(0)", "print(2)"]
    humans = [{"rating": 2000, "points": 600}, {"rating": 1000, "points": 400}]
    (tmp_path / "7.json").write_text(json.dumps({"problems": {"A": 500, "B": 1000}, "standings": humans}))
    (tmp_path / "ratings.json").write_text("[800, 1400, 1600, 2400]")
    rows = rows_file(tmp_path, [{"problem": "add", "inputs": ["1"], "outputs": ["2"], "contest": "7", "index": "A"}])
    given = ["--data", f"codeforces={rows}", "--server", url, "--served-model", "m", "--output", str(tmp_path / "out")]
    main(["evaluate", "codeforces", *given, "--n", "2", "--contests", str(tmp_path), "rollout.max_num_seqs=1"])
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["codeforces"]
    assert found["avg"] == 0.5
    assert found["rating"] == pytest.approx(1500, abs=0.01) and found["percentile"] == 50.0
    assert found["rating_not_asked"] == 1
    assert "1 problems of the rated contests were not asked" in capsys.readouterr().err


def test_a_test_of_humaneval_plus_may_import_numpy(chat: tuple[Chat, str], tmp_path: Path) -> None:
    behind, url = chat
    behind.says = ["def f(x):\n    return x"]
    test = "import numpy as np\ndef check(candidate):\n    assert np.allclose(candidate(1.0), 1.0)\n"
    rows = rows_file(tmp_path, [{"prompt": "def f(x):\n    pass\n", "entry_point": "f", "test": test}])
    given = ["--data", f"humaneval+={rows}", "--server", url, "--served-model", "m", "--output", str(tmp_path / "out")]
    main(["evaluate", "humaneval+", *given, "--n", "1", "reward.workers=1"])
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["humaneval+"]
    assert (found["avg"], found["ungraded_share"]) == (1.0, 0.0)


def test_a_rating_needs_contests_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = {"problem": "add", "inputs": ["1"], "outputs": ["2"], "contest": "7", "index": "B"}
    given = ["--server", "http://x", "--served-model", "m", "--output", str(tmp_path / "out")]
    given += ["--contests", str(tmp_path)]

    def refused(*rows: dict[str, Any]) -> str:
        with pytest.raises(SystemExit):
            main(["evaluate", "codeforces", "--data", f"codeforces={rows_file(tmp_path, [*rows])}", *given])
        return capsys.readouterr().err

    assert "7.json cannot be read" in refused(problem)
    contest = {"problems": {"A": 500}, "standings": [{"rating": 1500, "points": 300}]}
    (tmp_path / "7.json").write_text(json.dumps(contest))
    assert "contest 7 has no problem 'B'" in refused(problem)
    assert "has no contest and index" in refused(problem, {"problem": "x", "inputs": ["1"], "outputs": ["2"]})


def test_a_key_is_sent(chat: tuple[Chat, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    behind, url = chat
    monkeypatch.setenv("THE_KEY", "secret")
    run(f"{url}/v1/", tmp_path, "--n", "1", "--api-key-variable", "THE_KEY")
    assert set(behind.keys) == {"Bearer secret"}
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a benchmark, such as math500"),
        (["math50"], "'math50' is no benchmark, and no file; there are aime24"),
        (["math500", "--model", "x"], "give either --model or --server"),
        (["math500", "--n", "0"], "--n 0 cannot be"),
        (["math500", "--top-p", "0"], "--top-p 0.0 cannot be"),
        (["math500", "--data", "gsm8k=x"], "--data names gsm8k, which is not evaluated"),
        (["math500", "--data", "math500="], "--data math500 is no NAME=FILE"),
        (["math500", "--data", "math500=/gone.jsonl"], "'/gone.jsonl' does not exist"),
        (["livecodebench"], "'lighteval/code_generation_lite:release_v5' is no file or folder here"),
        (["math500", "--since", "May"], "--since May is no date such as 2024-08-01"),
        (["math500", "--template", "{problem}!"], "--template is for a file of yours"),
        (["gone.jsonl"], "input file 'gone.jsonl' does not exist"),
        (["gone.jsonl", "--template", "?"], "--template '?' has no {problem}"),
        (["math500", "--contests", "."], "--contests is given, and no problem has a contest"),
        (["math500", "some/math500.jsonl"], "two of what is to be evaluated would be called math500"),
        (["math500", "--api-key-variable", "NONE_SUCH"], "the environment has no NONE_SUCH"),
        (["math500", "optimizer.lr=1"], "does not read optimizer.lr"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[:1] == ["math500"] and "--data" not in arguments:
        arguments = [*arguments, "--data", f"math500={rows_file(tmp_path)}"]
    with pytest.raises(SystemExit):
        main(["evaluate", *arguments, "--server", "http://x", "--served-model", "m", "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "x"}], "answer, final_answer, ground_truth and reward_model.ground_truth are missing, or null"),
        ([{"answer": "x"}], "one of the columns problem, question, prompt has to be text"),
        ([{"problem": "x", "answer": None}], "reward_model.ground_truth are missing, or null"),
        ([{"problem": "x", "answer": {}}], "is no answer; give text, or a number"),
        ([ROWS[0], ROWS[0]], "rows with the same id"),
    ],
)
def test_rows_that_are_no_problems_are_named(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"math500={rows_file(tmp_path, rows)}"
    given = ["--server", "http://x", "--served-model", "m", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["evaluate", "math500", "--data", data, *given])
    assert message in capsys.readouterr().err


def test_a_model_that_has_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model("qwen2", tmp_path / "model")
    given = ["--data", f"math500={rows_file(tmp_path)}", "--model", str(model), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["evaluate", "math500", *given])
    assert "--max-tokens 8192 leaves no room for a prompt" in capsys.readouterr().err


def test_the_forms_of_rows(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "He has 1,000.\n#### 1,000"}]
    (gsm8k,) = read_problems(benchmark_of("gsm8k"), str(rows_file(tmp_path, rows)))
    assert gsm8k.ground_truth == "1000" and gsm8k.id == "0"
    rows = [{"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}]
    (code,) = read_problems(benchmark_of("humaneval"), str(rows_file(tmp_path, rows)))
    assert code.id == "HumanEval/0" and "```python\ndef f():\n\n```" in code.prompt
    assert code.ground_truth == {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
    rows = [{"problem": "add", "inputs": ["1"], "outputs": ["2"], "contest": "1", "index": "A"}]
    (stdin,) = read_problems(benchmark_of("codeforces"), str(rows_file(tmp_path, rows)))
    assert stdin.ground_truth == {"inputs": ["1"], "outputs": ["2"]}
    assert len(BENCHMARKS) == 11


def test_a_file_of_ones_own(chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    behind, url = chat
    file = tmp_path / "own.jsonl"
    rows = [{"prompt": [{"role": "user", "content": "1 + 1"}], "reward_model": {"ground_truth": "2"}}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = ["evaluate", str(file), "--server", url, "--served-model", "m", "--output", str(tmp_path / "out")]
    main([*given, "--n", "2", "--template", "Compute {problem} in \\boxed{}", "reward.workers=1"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["own"]["avg"] == 1.0
    assert behind.asked[0]["messages"][0]["content"] == "Compute 1 + 1 in \\boxed{}"
    main([*given, "--n", "2", "--template", "Compute {problem} in \\boxed{}", "reward.workers=1"])
    assert len(behind.asked) == 2
    with pytest.raises(SystemExit):
        main([*given, "--n", "2", "--template", "Compute {problem} in \\boxed{}", "reward.grader=exact"])
    assert "has answers of another evaluation (another grading of own)" in capsys.readouterr().err


def test_a_summary_by_hand() -> None:
    def answer(which: str, sample: int, score: float, key: str | None, text: str = "a b") -> GradedText:
        return GradedText(which, sample, text, 10 * (sample + 1), "stop", score, key, None)

    answers = [answer("p", 0, 1.0, "3"), answer("p", 1, 0.0, "4"), answer("q", 0, 0.0, None), answer("q", 1, 0.0, "5")]
    found = summarize(answers, ["p", "q"], correct_from=1.0)
    assert (found["avg"], found["pass@1"], found["pass@2"], found["maj@2"]) == (0.25, 0.25, 0.5, 0.25)
    assert found["tokens_mean"] == 15 and found["self_bleu"] == 1.0 and found["clusters"] == 1.0
    assert summarize([], ["p"], 1.0) == {"problems": 0}
