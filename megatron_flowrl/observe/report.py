"""Runs beside one another, as one HTML file that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_flowrl.config import UserError
from megatron_flowrl.observe.line import duration
from megatron_flowrl.observe.runs import Course, Run, different_settings, missing_steps, read_runs, troubles
from megatron_flowrl.platform.atomic import write_file

_LONGEST = 1200  # characters of an answer
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1f2328; background: #fff;
  max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .2rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d8dee4; }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem; }}
p, figcaption {{ color: #57606a; margin: .2rem 0 .8rem; }}
figure {{ margin: 0 0 1.2rem; break-inside: avoid; }}
figure img {{ display: block; max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; margin-bottom: .8rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #e6e9ed; }}
thead th {{ color: #57606a; font-weight: 600; border-bottom: 1px solid #afb8c1; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
tbody tr {{ break-inside: avoid; }}
code, pre {{ font: .93em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
pre {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto;
  unicode-bidi: isolate; }}
th.n {{ white-space: normal; }}
bdi {{ overflow-wrap: break-word; }}
.run {{ white-space: nowrap; }}
.chip {{ display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }}
.samples {{ table-layout: fixed; width: 100%; }}
summary {{ cursor: pointer; color: #57606a; }}
@media print {{
  body {{ max-width: none; margin: 0; font-size: 11px; }}
  table {{ font-size: .85em; }}
  th, td {{ padding: .15rem .35rem; }}
  h2 {{ break-after: avoid; }}
  h3 {{ break-after: avoid; }}
  pre {{ max-height: none; overflow: visible; }}
  .wide {{ overflow: visible; }}
  .chip {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write `output`, one self-contained HTML file about the runs in these folders, in this order.

    Raises UserError for a folder that is no run (it names what is missing), where matplotlib is not installed, and
    where `output` cannot be written.
    """
    if not runs:
        raise UserError("a report needs at least one run: give the run.folder of a training run")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"a report needs matplotlib, which cannot be imported ({error}): pip install -e '.[report]'"
        ) from error
    read = read_runs(runs)
    parts = [part for section in _SECTIONS for part in section(read)]
    title = _text("Training report: " + ", ".join(run.label for run in read))
    page = _PAGE.format(title=title, body="\n".join(parts))
    try:
        write_file(output, page)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; give another --output, or make room") from error


def _headline(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h1>Training report</h1>"
    yield f"<p>{len(runs)} run{'s' if len(runs) > 1 else ''}; first &rarr; last value of each</p>"
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda run: _run_name(runs, runs.index(run)),
        "method": lambda run: _bdi(run.method),
        "steps": lambda run: str(run.steps[-1]),
        "time": lambda run: duration(run.times[-1] - run.times[0]).strip() if len(run.times) > 1 else "",
        "accuracy, held out": lambda run: _change(run.first_of("evaluation/accuracy")),
        "loss, held out": lambda run: _change(run.first_of("evaluation/loss")),
        "coverage": lambda run: _change(run.first_of("evaluation/coverage", "rollout/coverage")),
        "distinct valid answers": lambda run: _change(
            run.first_of("evaluation/distinct_correct", "rollout/distinct_correct")
        ),
        "training reward": lambda run: _change(run.first_of("rollout/reward_mean")),
        "KL to reference": lambda run: _change(run.first_of("update/kl_reference")),
        "tokens/s": lambda run: _mean(run.first_of("speed/tokens_per_second")),
    }
    cells = {name: [cell(run) for run in runs] for name, cell in columns.items()}
    cells = {name: values for name, values in cells.items() if any(values)}
    rows = zip(*cells.values(), strict=True)
    yield _table(list(cells), rows, numeric=range(2, len(cells)))


def _settings(runs: Sequence[Run]) -> Iterator[str]:
    table = different_settings(runs)
    yield "<h2>Settings</h2>"
    if len(runs) == 1:
        yield "<p>Those that are not the defaults.</p>"
    else:
        yield f"<p>{'Those that differ between the runs.' if table else 'The runs have the same settings.'}</p>"
    if table:
        rows = ([f"<code>{_text(key)}</code>", *map(_bdi, values)] for key, values in table.items())
        yield _table(["setting", *(_run_name(runs, index) for index in range(len(runs)))], rows)


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    from megatron_flowrl.observe.drawing import COLUMNS
    from megatron_flowrl.observe.figures import draw_all

    yield "<h2>Curves</h2>"
    yield (
        "<p>Faint: as measured, step by step. Strong: running mean over about one in fifteen of the steps. "
        "Courses of few points are drawn as measured, with marks.</p>"
    )
    for drawing in draw_all(runs):
        width = round(100 * drawing.panels / COLUMNS)
        title = _text(drawing.title)
        yield f'<figure><h3>{title}</h3><img style="width: {width}%" alt="{title}" src="{drawing.data_uri()}"></figure>'


def _samples(runs: Sequence[Run]) -> Iterator[str]:
    if not any(run.samples for run in runs):
        return
    yield "<h2>Answers</h2>"
    yield "<p>Of the first, a middle and the last step that has some.</p>"
    for index, run in enumerate(runs):
        steps = sorted(run.samples)
        if not steps:
            continue
        rows = []
        for step in dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]):
            for sample in run.samples[step]:
                texts = [f"<pre>{_beginning(sample.get(name))}</pre>" for name in ("prompt", "response")]
                rows.append([str(step), *texts, _number(sample.get("reward"))])
        yield f"<h3>{_run_name(runs, index)}</h3>"
        widths = (
            '<colgroup><col style="width: 4rem"><col style="width: 32%"><col><col style="width: 5.5rem"></colgroup>'
        )
        yield _table(["step", "prompt", "answer", "reward"], rows, numeric=(0, 3), kind="samples", columns=widths)


def _troubles(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h2>Skipped, cut off, failed</h2>"
    rows = []
    for index, run in enumerate(runs):
        name = _run_name(runs, index)
        for one in troubles(run):
            numbers = [f"{one.steps} of {len(run.steps)}", *map(_number, (one.mean, one.largest)), str(one.at)]
            rows.append([name, f"<code>{_text(one.name)}</code>", *numbers])
        for scalar, count in run.not_finite.items():
            what = f"<code>{_text(scalar)}</code> was not a finite number"
            rows.append([name, what, f"{count} of {len(run.steps)}", "", "", ""])
        gaps = missing_steps(run)
        if gaps:
            rows.append([name, "not in metrics.jsonl", str(len(gaps)), "", "", str(gaps[0])])
    if rows:
        yield _table(["run", "what", "steps", "mean", "largest", "at step"], rows, numeric=range(2, 6))
    else:
        yield "<p>Nothing was skipped, cut off or lost.</p>"


def _numbers(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h2>All numbers</h2>"
    for index, run in enumerate(runs):
        rows = []
        for name, course in sorted(run.scalars.items()):
            values = [value for _, value in course]
            numbers = map(_number, (values[0], values[-1], min(values), max(values)))
            rows.append([f"<code>{_text(name)}</code>", *numbers])
        yield f"<details><summary>{_run_name(runs, index)}: {len(rows)} of them</summary>"
        yield _table(["name", "first", "last", "smallest", "largest"], rows, numeric=range(1, 5))
        yield "</details>"


_SECTIONS: tuple[Callable[[Sequence[Run]], Iterator[str]], ...] = (
    _headline, _settings, _curves, _samples, _troubles, _numbers,
)  # fmt: skip


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = (), kind: str = "", columns: str = ""
) -> str:
    """Heads and cells are HTML already."""
    right = set(numeric)

    def line(cells: Sequence[str], tag: str) -> str:
        opened = [f'{tag} class="n"' if place in right else tag for place in range(len(cells))]
        marked = (f"<{begin}>{cell}</{tag}>" for begin, cell in zip(opened, cells, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    opened = f'<table class="{kind}">' if kind else "<table>"
    return f'<div class="wide">{opened}{columns}<thead>{line(heads, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def _run_name(runs: Sequence[Run], index: int) -> str:
    from megatron_flowrl.observe.drawing import color_of, shortened

    chip, label = f'<span class="chip" style="background: {color_of(index)}"></span>', runs[index].label
    return f'<span class="run" title="{_text(label)}">{chip}{_bdi(shortened(label))}</span>'


def _bdi(text: str) -> str:
    return f"<bdi>{_text(text)}</bdi>"


def _text(text: object) -> str:
    """Text of a run, which may be anything, as HTML: no markup, no control characters, nothing that turns it around."""
    clean = str(text).encode("utf-8", "replace").decode()
    return html.escape(_UNFIT.sub("\ufffd", clean), quote=True)


def _beginning(text: object) -> str:
    whole = "" if text is None else str(text)
    more = len(whole) - _LONGEST
    return _text(whole) if more <= 0 else f"{_text(whole[:_LONGEST])}\n<em>... {more:,} characters more</em>"


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else _text(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _change(course: Course) -> str:
    return f"{_number(course[0][1])} &rarr; {_number(course[-1][1])}" if course else ""


def _mean(course: Course) -> str:
    return _number(sum(value for _, value in course) / len(course)) if course else ""


__all__ = ["write_report"]
