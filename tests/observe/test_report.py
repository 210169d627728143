"""Reports: one file that needs nothing else, whatever the runs have said."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_flowrl.config import TrackingConfig, UserError, load_config, to_yaml
from megatron_flowrl.observe.drawing import Drawing
from megatron_flowrl.observe.figures import draw_all, smoothed, window
from megatron_flowrl.observe.recorder import Recorder, Sample
from megatron_flowrl.observe.report import write_report
from megatron_flowrl.observe.runs import read_runs

HOSTILE = "<script>alert(1)</script></pre><img src=x onerror=alert(1)>\"' & \u202egnp.exe\x00\x1b[31m \ud800 $\\frac{$"


def scalars_of(step: int, **more: float) -> dict[str, float]:
    return {
        "rollout/reward_mean": 0.01 * step,
        "rollout/truncated_share": 0.25 if step == 3 else 0.0,
        "update/grad_norm": math.nan if step == 2 else 1.0,
        "time/generate": 2.0,
        "time/update": 1.0,
        "time/step": 4.0,
        **more,
    }


def make_run(
    folder: Path,
    overrides: Sequence[str] = (),
    steps: int = 6,
    scalars: Mapping[str, float] | None = None,
    response: str = "an answer",
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(None, [f"run.folder={folder}", *overrides])))
    with Recorder(folder, TrackingConfig(tensorboard=False), resume_step=0, hyper_parameters={}) as recorder:
        for step in range(1, steps + 1):
            found = scalars_of(step, **{"evaluation/accuracy": 0.125 * step}) if scalars is None else scalars
            recorder.record(step, found, {}, [Sample(f"prompt of {step}", f"{response} {step}", step / 8, None)])
    return folder


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "col"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # every tag is closed, in order

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2]) for source in sources]

    def row(self, *begin: str) -> list[str]:
        (found,) = [row for row in self.rows if row[: len(begin)] == list(begin)]
        return found


def report(tmp_path: Path, *runs: Path) -> Page:
    write_report(runs, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def drawn(*runs: Path) -> dict[str, Drawing]:
    return {drawing.title: drawing for drawing in draw_all(read_runs(runs))}


def test_it_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", ["objective.name=grpo"]))
    assert not page.open
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not {"href", "srcset", "action", "background"} & {name for _, given in page.tags for name in given}
    assert not re.search(r"url\(|@import|https?:", (tmp_path / "report.html").read_text())
    assert len(page.images()) == 4
    for image in page.images():
        assert ElementTree.fromstring(image).tag.endswith("svg")


def test_what_runs_say_is_text(tmp_path: Path) -> None:
    name = "run <b>&$x^{_"
    run = make_run(tmp_path / name, response=HOSTILE)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "skipped/<i>": 1.0, "<u>": None, "a": "<s>", "b": [HOSTILE]}) + "\n")
    page = report(tmp_path, run, make_run(tmp_path / "_b", ["objective.name='<script>'", "model.path='<i>'"]))
    assert not page.open
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead", "tbody"}
    known |= {"tr", "th", "td", "code", "bdi", "span", "pre", "figure", "img", "col", "colgroup", "details", "summary"}
    assert {tag for tag, _ in page.tags} <= known
    assert not [attribute for _, given in page.tags for attribute in given if attribute.startswith("on")]
    assert "<script>alert(1)</script></pre><img src=x onerror=alert(1)>\"' & " in page.text and name in page.text
    assert not re.search("[\x00\x1b\u202e\ud800]", page.text)


def test_headlines(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", ["objective.preset=paper"])
    two = make_run(tmp_path / "two", ["objective.name=grpo"], scalars={"evaluation/coverage": 0.5})
    page = report(tmp_path, one, two)
    heads = page.row("run", "method")
    first, second = page.row("one", "flowrl (paper)"), page.row("two", "grpo")
    assert first[heads.index("accuracy, held out")] == "0.125 \u2192 0.75"
    assert second[heads.index("accuracy, held out")] == "" and second[heads.index("coverage")] == "0.5 \u2192 0.5"
    assert "tokens/s" not in heads  # no run has them


def test_settings_are_those_that_differ(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", ["optimizer.lr=1e-5"]), make_run(tmp_path / "two", ["optimizer.lr=2e-5"])
    page = report(tmp_path, one, two)
    assert page.row("optimizer.lr") == ["optimizer.lr", "1e-05", "2e-05"]
    assert not [row for row in page.rows if row[0] in ("run.folder", "optimizer.weight_decay")]
    alone = report(tmp_path, one)
    assert alone.row("optimizer.lr") == ["optimizer.lr", "1e-05"] and "not the defaults" in alone.text
    same = report(tmp_path, one, make_run(tmp_path / "three", ["optimizer.lr=1e-5"]))
    assert "same settings" in same.text


def test_answers_of_the_first_a_middle_and_the_last_step(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "a", response="x" * 5000))
    answers = [row for row in page.rows if len(row) == 4 and row[1].startswith("prompt of")]
    assert [(row[0], row[1], row[3]) for row in answers] == [
        ("1", "prompt of 1", "0.125"), ("4", "prompt of 4", "0.5"), ("6", "prompt of 6", "0.75"),
    ]  # fmt: skip
    assert answers[0][2] == "x" * 1200 + "\n... 3,802 characters more"


def test_what_was_skipped_or_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in kept if '"step": 4' not in line))
    page = report(tmp_path, run)
    assert page.row("a", "rollout/truncated_share") == ["a", "rollout/truncated_share", "1 of 5", "0.05", "0.25", "3"]
    assert page.row("a", "update/grad_norm was not a finite number")[2] == "1 of 5"
    assert page.row("a", "not in metrics.jsonl")[2:] == ["1", "", "", "4"]
    clean = report(tmp_path, make_run(tmp_path / "b", scalars={"rollout/truncated_share": 0.0}))
    assert "Nothing was skipped" in clean.text


def test_a_line_that_is_cut_off_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 7, "rollout/rew')
    assert read_runs([run])[0].steps == [1, 2, 3, 4, 5, 6]


def test_curves_share_axes_and_say_what_they_are(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", steps=60)
    two = make_run(tmp_path / "two", steps=6)
    figures = drawn(one, two)
    assert list(figures) == ["Reward", "Updates", "Length and speed", "Time of a step"]  # of what there is
    for drawing in figures.values():
        for axis in drawing.figure.axes:
            assert axis.get_title() and axis.get_xlabel() == "step" and axis.get_ylabel()
        assert drawing.png().startswith(b"\x89PNG")
    reward, accuracy = figures["Reward"].figure.axes
    assert (reward.get_title(), accuracy.get_title()) == (
        "Reward of the training answers",
        "Accuracy on held-out prompts",
    )
    faint, strong, short = reward.get_lines()
    assert faint.get_color() == strong.get_color() != short.get_color()
    assert faint.get_alpha() == 0.25 and strong.get_alpha() is None
    assert list(short.get_ydata()) == pytest.approx([0.01 * step for step in range(1, 7)])
    (legend,) = figures["Reward"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_the_same_runs_make_the_same_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    pages = []
    for _ in range(2):
        write_report([run], tmp_path / "report.html")
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_time_by_phase_with_what_has_no_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    drawing = drawn(run)["Time of a step"]
    (axis,) = drawing.figure.axes
    heights = [max(y for path in area.get_paths() for _, y in path.vertices) for area in axis.collections]
    assert heights == [2.0, 3.0, 4.0]  # generate, update, the rest of the step
    (legend,) = drawing.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["generate", "update", "other"]


def test_many_runs_and_long_names(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{'long ' * 15}{n}", scalars={"update/loss": 10.0**n}) for n in range(10)]
    (legend,) = drawn(*runs)["Updates"].figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(set(names)) == 10 and max(map(len, names)) <= 45
    assert drawn(*runs)["Updates"].figure.axes[0].get_yscale() == "log"
    assert len(report(tmp_path, *runs).images()) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-12, 1e30])
def test_a_run_of_one_step_is_drawn(value: float, tmp_path: Path) -> None:
    names = ("update/loss", "update/kl_reference", "rollout/accuracy", "time/update")
    run = make_run(tmp_path / "a", steps=1, scalars=dict.fromkeys(names, value))
    assert len(report(tmp_path, run).images()) == 4


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / seed / "flowrl") for seed in ("seed1", "seed2")]
    assert [run.label for run in read_runs(runs)] == ["seed1/flowrl", "seed2/flowrl"]
    assert [run.label for run in read_runs(runs[:1])] == ["flowrl"]
    assert [run.label for run in read_runs([runs[0], runs[0]])] == ["flowrl", "flowrl"]


def test_running_means() -> None:
    course = [(step, float(step)) for step in range(90)]
    assert window(course) == 7 and window(course[:29]) == 1
    assert smoothed(course)[3:-3] == pytest.approx([float(step) for step in range(3, 87)])
    assert smoothed(course)[0] == 1.5 and smoothed(course)[-1] == 87.5
    assert smoothed(course[:5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), r"/a is no run: it has no metrics\.jsonl; give the run\.folder"),
        (lambda run: (run / "config.yaml").unlink(), r"/a is no run: it has no config\.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), r"config\.yaml:1: not valid YAML"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step"'), r"metrics\.jsonl has no finished step"),
        (lambda run: run.rename(run.with_name("b")), r"/a is no run: there is no such folder"),
    ],
)
def test_what_is_no_run_is_named(spoil: Any, problem: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    spoil(run)
    with pytest.raises(UserError, match=problem):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="2 problems") as caught:
        write_report([tmp_path / "empty", make_run(tmp_path / "good"), tmp_path / "absent"], tmp_path / "report.html")
    assert [problem.partition(" is no run")[0] for problem in caught.value.problems] == [
        str(tmp_path / "empty"),
        str(tmp_path / "absent"),
    ]
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path / "report.html")


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/report\.html cannot be written: No such file or directory; give"):
        write_report([make_run(tmp_path / "a")], tmp_path / "absent" / "report.html")


def test_a_missing_matplotlib_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[report\]'"):
        write_report([tmp_path], tmp_path / "report.html")
