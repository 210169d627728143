"""`megatron-flowrl compare`: evaluations beside one another, as a table and as pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.evaluation.judge import judged_numbers
from megatron_flowrl.evaluation.results import DIVERSITY, SUMMARY, Numbers, percent
from megatron_flowrl.observe.log import logger
from megatron_flowrl.observe.runs import labels_of
from megatron_flowrl.platform.atomic import write_bytes

QUALITY_PNG, DIVERSITY_PNG = "quality.png", "diversity.png"


def read_evaluation(folder: Path) -> tuple[dict[str, Any], Numbers]:
    """A folder's summary, and its benchmarks' numbers, with the judge's where there are some. Raises UserError."""
    file = folder / SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        numbers = {str(name): _checked(of) for name, of in summary["benchmarks"].items()}
    except OSError as error:
        raise UserError(
            f"{folder} is no evaluation: {SUMMARY} cannot be read ({error.strerror}); give the --output of evaluate"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no summary of an evaluation ({type(error).__name__}: {error})") from error
    for name, of in numbers.items():
        judged = judged_numbers(folder / f"{name}.jsonl")
        if judged["judged"]:
            of["judged"], of["judged_interval"] = judged["diversity"], judged["interval"]
    return summary, numbers


def _checked(of: Mapping[str, Any]) -> dict[str, Any]:
    """Every number is one, and what is drawn with an interval has it. Raises ValueError, KeyError or TypeError."""
    for name, value in of.items():
        values = value if name.endswith("_interval") else [] if isinstance(value, Mapping) else [value]
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
            raise ValueError(f"{name} is {value!r}")
    drawn = [name for name in of if name in ("avg", *DIVERSITY) or name.startswith(("pass@", "maj@"))]
    for name in drawn:
        if not name.endswith("_interval"):
            low, high = of[f"{name}_interval"]
            if not low <= high:
                raise ValueError(f"{name}_interval is {[low, high]}")
    if not {"n", "avg", "pass@1"} <= {*of}:
        raise ValueError("n, avg or pass@1 is missing")
    return dict(of)


def compare(folders: Sequence[Path], output: Path) -> str:
    """Write the pictures into the folder `output`, and return a table in Markdown. Raises UserError."""
    summaries, found = {}, {}
    for folder, label in zip(folders, labels_of(folders), strict=True):
        summaries[label], found[label] = read_evaluation(folder)
    plans = [summary.get("plan") or {} for summary in summaries.values()]
    for setting in ("n", "temperature", "top_p", "max_tokens", "chat"):
        values = [plan.get(setting) for plan in plans]
        if len({*values}) > 1:
            logger.warning("the evaluations differ in %s: %s", setting, ", ".join(map(str, values)))
    draw(found, output)
    return table(summaries, found)


def draw(evaluations: Mapping[str, Numbers], output: Path) -> list[Path]:
    """The pictures, and where they are. Raises UserError where matplotlib is not installed."""
    try:
        from megatron_flowrl.evaluation.figures import draw_diversity, draw_quality
    except ImportError as error:
        raise UserError(
            f"pictures need matplotlib, which cannot be imported ({error}): pip install -e '.[report]'"
        ) from error
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for drawing, name in ((draw_quality(evaluations), QUALITY_PNG), (draw_diversity(evaluations), DIVERSITY_PNG)):
        if drawing is not None:
            write_bytes(output / name, drawing.png())
            written.append(output / name)
    return written


def table(summaries: Mapping[str, Mapping[str, Any]], evaluations: Mapping[str, Numbers]) -> str:
    """A line a benchmark and measure, a column an evaluation. pass@k is of the largest k that all of them have."""
    lines = [f"| | | {' | '.join(evaluations)} |", f"| --- | --- |{' ---: |' * len(evaluations)}"]

    def line(name: str, measure: str, cells: Sequence[str]) -> None:
        if any(cells):
            lines.append(f"| {name} | {measure} | {' | '.join(cells)} |")

    def shown(columns: Sequence[Mapping[str, Any]], measure: str, form: str) -> list[str]:
        return [format(of[measure], form) if measure in of else "" for of in columns]

    for name in dict.fromkeys(name for some in evaluations.values() for name in some):
        columns = [some.get(name, {}) for some in evaluations.values()]
        line(name, "problems x answers", [f"{of['problems']} x {of['n']}" if of else "" for of in columns])
        line(name, "Avg@n", [percent(of, "avg") for of in columns])
        common = set.intersection(*({one for one in of if one.startswith("pass@")} for of in columns if of))
        most = max((int(one[5:]) for one in common if one[5:].isdigit()), default=1)
        line(name, f"pass@{most}", [percent(of, f"pass@{most}") for of in columns])
        for n in sorted({of["n"] for of in columns if of}):
            line(name, f"maj@{n}", [percent(of, f"maj@{n}") for of in columns])
        for measure, (title, _) in DIVERSITY.items():
            line(name, title.lower(), shown(columns, measure, ".3f"))
        line(name, "rating", shown(columns, "rating", ".0f"))
        line(name, "percentile", shown(columns, "percentile", ".1f"))
        line(name, "tokens", shown(columns, "tokens_mean", ".0f"))
        line(name, "not graded", shown(columns, "ungraded_share", ".1%"))
    means = [summary.get("math_six") for summary in summaries.values()]
    line("mean of the six", "Avg@n", ["" if mean is None else f"{100 * mean:.1f}" for mean in means])
    return "\n".join(lines)


__all__ = ["DIVERSITY_PNG", "QUALITY_PNG", "compare", "draw", "read_evaluation", "table"]
