"""The judge of diversity: what it is shown, what counts as a score, and what becomes of a problem without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.cli import main
from megatron_flowrl.evaluation.judge import judged_numbers, score_of
from tests.evaluation.conftest import Chat

pytestmark = pytest.mark.usefixtures("process_as_it_was")


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("They all factor.\nScore: 1", 1),
        ("**Score: 4**", 4),
        ("Score: 3/5\n", 3),
        ("Score: 2\nNo, on reflection:\n\nScore: 5", 5),
        ("I would give a score: 3, as", None),
        ("Score: 7", None),
        ("Score: 33", None),
        ("", None),
    ],
)
def test_what_counts_as_a_score(said: str, score: int | None) -> None:
    assert score_of(said) == score


def answers_file(folder: Path) -> Path:
    def line(which: str, sample: int) -> dict[str, Any]:
        text = f"answer {sample} to {which}, " + "long " * 5000 + "end"
        about = {"id": which, "sample": sample, "response": text, "tokens": 9, "finish_reason": "stop"}
        return about | {"score": 1.0, "key": "k", "problem": None}

    file = folder / "math500.jsonl"
    file.write_text("".join(f"{json.dumps(line(which, sample))}\n" for which in "pqr" for sample in (1, 0)))
    return file


def judged(url: str, file: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["judge", str(file), "--server", url, "--served-model", "m", "rollout.max_num_seqs=1"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_answers_are_judged_whole_and_what_fails_is_counted(
    chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind, url = chat
    file = answers_file(tmp_path)
    behind.says = ["All alike.\nScore: 1", "I cannot say.", "Score: 4"]
    found = judged(url, file, capsys)
    assert found | {"interval": None} == {"judged": 2, "not_judged": 1, "diversity": 2.5, "interval": None}
    prompts = [body["messages"][0]["content"] for body in behind.asked]
    assert all(prompt.count("long ") == 10000 and prompt.count("end") >= 2 for prompt in prompts)
    assert prompts[0].index("answer 0 to p") < prompts[0].index("answer 1 to p")
    behind.says = ["Score: 4"]
    assert judged(url, file, capsys)["diversity"] == 3.0  # the one without a score was asked again, and no other
    assert len(behind.asked) == 4
    lines = [json.loads(line) for line in (tmp_path / "math500.judged.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [1, None, 4, 4] and lines[1]["said"] == "I cannot say."


def test_a_server_that_fails_loses_nothing(
    chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind, url = chat
    file = answers_file(tmp_path)
    behind.says, behind.fail_from = ["Score: 2", "Score: 3"], 1
    with pytest.raises(SystemExit):
        main(["judge", str(file), "--server", url, "--served-model", "m", "generation.max_retries=0"])
    assert "the same command goes on" in capsys.readouterr().err
    behind.fail_from, behind.says = None, ["Score: 3", "Score: 3", "Score: 3"]
    assert judged(url, file, capsys)["judged"] == 3


def test_a_file_without_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["judge", str(tmp_path / "gone.jsonl"), "--server", "http://x", "--served-model", "m"])
    assert "has no answers; megatron-flowrl evaluate writes such files" in capsys.readouterr().err


def test_another_judge_and_other_answers_are_judged_anew(
    chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind, url = chat
    file = answers_file(tmp_path)
    behind.says = ["Score: 1"] * 3
    assert judged(url, file, capsys)["diversity"] == 1.0
    behind.says = ["Score: 5"] * 3
    main(["judge", str(file), "--server", url, "--served-model", "another"])
    assert json.loads(capsys.readouterr().out)["diversity"] == 5.0
    assert judged_numbers(file)["diversity"] == 5.0  # the judge who spoke last
    file.write_text(file.read_text().replace("answer 1 to p", "another answer to p"))
    assert judged_numbers(file)["judged"] == 2
    behind.says = ["Score: 4"]
    assert judged(url, file, capsys)["diversity"] == 2.0 and len(behind.asked) == 7


def test_a_line_that_was_cut_off_swallows_no_other(
    chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind, url = chat
    file, said = answers_file(tmp_path), tmp_path / "math500.judged.jsonl"
    said.write_text('{"id": "p", "sco')
    behind.says = ["Score: 3"] * 3
    assert judged(url, file, capsys)["judged"] == 3
    assert judged_numbers(file)["judged"] == 3 and len(said.read_text().splitlines()) == 3
    said.write_text("[]\n")
    with pytest.raises(SystemExit):
        main(["judge", str(file), "--server", url, "--served-model", "m"])
    assert "has lines that are none of a judge's" in capsys.readouterr().err


def test_where_nobody_gives_a_score(chat: tuple[Chat, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    behind, url = chat
    behind.says = ["Hm."] * 3
    assert judged(url, answers_file(tmp_path), capsys) == {
        "judged": 0, "not_judged": 3, "diversity": None, "interval": None,
    }  # fmt: skip
