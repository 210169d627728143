"""Evaluations beside one another: the table's numbers, the pictures' parts, and folders that are none."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from megatron_flowrl.cli import main
from megatron_flowrl.evaluation.compare import read_evaluation
from megatron_flowrl.evaluation.figures import draw_diversity, draw_quality
from megatron_flowrl.evaluation.judge import _digest
from megatron_flowrl.evaluation.results import GradedText, summarize
from megatron_flowrl.observe.drawing import color_of

NOBODY: Mapping[str, Sequence[int | None]] = {}


def evaluation(folder: Path, right: int, texts: list[str], judged: Mapping[str, Sequence[int | None]] = NOBODY) -> Path:
    """Of four answers to each of two problems of math500, `right` to the first."""
    folder.mkdir()
    answers = [
        GradedText(which, sample, text, 5, "stop", float(which == "a" and sample < right), text[:1], None)
        for which in "ab"
        for sample, text in enumerate(texts)
    ]
    summary = {"plan": {}, "benchmarks": {"math500": summarize(answers, ["a", "b"], 1.0)}, "math_six": right / 8}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "math500.jsonl").write_text("".join(f"{json.dumps(asdict(one))}\n" for one in answers))
    digests = {which: _digest([one for one in answers if one.id == which]) for which in "ab"}
    lines = [
        {"id": which, "score": score, "said": "", "judge": judge, "answers": digests[which]}
        for judge, scores in judged.items()
        for which, score in zip("ab", scores, strict=True)
    ]
    if lines:
        (folder / "math500.judged.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flowrl = evaluation(
        tmp_path / "flowrl", 2, ["a b c d", "b c d e", "c d e f", "d e f g"], {"first": [1, 1], "last": [5, 4]}
    )
    grpo = evaluation(tmp_path / "grpo", 4, ["a b c d"] * 4)
    main(["compare", str(flowrl), str(grpo), "--output", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert "| | | flowrl | grpo |" in table
    assert "| math500 | Avg@n | 25.0 (0.0 - 50.0) | 50.0 (0.0 - 100.0) |" in table
    assert "| math500 | judged diversity | 4.500 |  |" in table
    assert "| math500 | problems x answers | 2 x 4 | 2 x 4 |" in table and "| math500 | pass@4 | " in table
    assert "| math500 | distinct final answers | 4.000 | 1.000 |" in table
    assert "| math500 | self-bleu | " in table and "| 1.000 |" in table
    assert "| mean of the six | Avg@n | 25.0 | 50.0 |" in table
    for name in ("quality.png", "diversity.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_evaluations_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    few = evaluation(tmp_path / "few", 2, ["a b", "b c"])
    many = evaluation(tmp_path / "many", 2, ["a b", "b c", "c d", "d e"])
    for folder, n in ((few, 2), (many, 4)):
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "plan": {"n": n}}))
    main(["compare", str(few), str(many), "--output", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert "the evaluations differ in n: 2, 4" in caplog.text
    assert "| math500 | pass@2 | " in table and "pass@4" not in table  # what both of them have
    assert "| math500 | maj@2 | " in table and "| math500 | maj@4 |  | " in table


def test_a_name_that_would_be_a_formula() -> None:
    numbers = {"n": 1, "avg": 0.5, "avg_interval": [0, 1], "pass@1": 0.5, "pass@1_interval": [0, 1]}
    assert draw_quality({"$x^$": {"cost_$x^$": numbers}}).png()


def test_what_the_pictures_show(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {
        label: read_evaluation(evaluation(tmp_path / label, right, texts))[1]
        for label, right, texts in (("one", 2, ["a b", "b c", "c d", "d e"]), ("two", 4, ["a b"] * 4))
    }
    quality = draw_quality(numbers).figure
    bars, passes = quality.axes
    assert [(to_hex(bar.get_facecolor()), bar.get_height()) for bar in bars.patches] == [
        (color_of(0), 0.25),
        (color_of(1), 0.5),
    ]
    assert [line.get_ydata().tolist() for line in passes.lines] == [
        [pytest.approx(0.25), pytest.approx(5 / 12), 0.5],
        [0.5] * 3,
    ]
    assert passes.get_title() == "math500: pass@k" and [text.get_text() for text in passes.get_xticklabels()] == [
        "1", "2", "4",
    ]  # fmt: skip
    assert [text.get_text() for text in quality.legends[0].get_texts()] == ["one", "two"]
    diversity = draw_diversity(numbers)
    assert diversity is not None
    titles = [axis.get_title() for axis in diversity.figure.axes]
    assert titles == ["Distinct final answers", "Clusters of wording", "Distinct pairs of words", "Self-BLEU"]
    assert [bar.get_height() for bar in diversity.figure.axes[0].patches] == [4.0, 1.0]
    assert draw_diversity({"empty": {}}) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no evaluation: summary.json cannot be read (No such file or directory)"),
        ("{", "is no summary of an evaluation (JSONDecodeError"),
        ("[]", "is no summary of an evaluation (TypeError"),
        ('{"benchmarks": {"x": {"avg": 0.5, "n": 2, "pass@1": 0.5}}}', "(KeyError: 'avg_interval')"),
        ('{"benchmarks": {"x": {"avg": null}}}', "(ValueError: avg is None)"),
        ('{"benchmarks": {"x": {"problems": 0}}}', "(ValueError: n, avg or pass@1 is missing)"),
    ],
)
def test_what_is_no_evaluation(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path), "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evaluation(tmp_path / "one", 2, ["a b", "b c"])
    monkeypatch.setitem(sys.modules, "megatron_flowrl.evaluation.figures", None)
    with pytest.raises(SystemExit):
        main(["compare", str(folder), "--output", str(tmp_path / "out")])
    assert "pictures need matplotlib" in capsys.readouterr().err
