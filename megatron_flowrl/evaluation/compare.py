"""`megatron-flowrl compare`: evaluations beside one another, as a table and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.evaluation.figures import DIVERSITY, Numbers, draw_diversity, draw_quality
from megatron_flowrl.evaluation.judge import judged_file, judged_numbers
from megatron_flowrl.evaluation.results import SUMMARY, percent
from megatron_flowrl.observe.runs import labels_of
from megatron_flowrl.platform.atomic import write_bytes

QUALITY_PNG, DIVERSITY_PNG = "quality.png", "diversity.png"


def read_evaluation(folder: Path) -> tuple[dict[str, Any], Numbers]:
    """A folder's summary, and its benchmarks' numbers, with the judge's where there are some. Raises UserError."""
    file = folder / SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        numbers = {str(name): dict(of) for name, of in summary["benchmarks"].items()}
    except OSError as error:
        raise UserError(
            f"{folder} is no evaluation: {SUMMARY} cannot be read ({error.strerror}); give the --output of evaluate"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no summary of an evaluation ({type(error).__name__}: {error})") from error
    for name, of in numbers.items():
        judged = judged_numbers(judged_file(folder / f"{name}.jsonl"))
        if judged["judged"]:
            of["judged"], of["judged_interval"] = judged["diversity"], judged["interval"]
            of["not_judged"] = judged["not_judged"]
    return summary, numbers


def compare(folders: Sequence[Path], output: Path) -> str:
    """Write the pictures into the folder `output`, and return a table in Markdown. Raises UserError."""
    summaries, found = {}, {}
    for folder, label in zip(folders, labels_of(folders), strict=True):
        summaries[label], found[label] = read_evaluation(folder)
    draw(found, output)
    return table(summaries, found)


def draw(evaluations: Mapping[str, Numbers], output: Path) -> list[Path]:
    """The pictures, and where they are."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for drawing, name in ((draw_quality(evaluations), QUALITY_PNG), (draw_diversity(evaluations), DIVERSITY_PNG)):
        if drawing is not None:
            write_bytes(output / name, drawing.png())
            written.append(output / name)
    return written


def table(summaries: Mapping[str, Mapping[str, Any]], evaluations: Mapping[str, Numbers]) -> str:
    """A line a benchmark and measure, a column an evaluation."""
    lines = [f"| | | {' | '.join(evaluations)} |", f"| --- | --- |{' ---: |' * len(evaluations)}"]

    def line(name: str, measure: str, cells: Sequence[str]) -> None:
        if any(cells):
            lines.append(f"| {name} | {measure} | {' | '.join(cells)} |")

    for name in dict.fromkeys(name for some in evaluations.values() for name in some):
        columns = [some.get(name, {}) for some in evaluations.values()]
        line(name, "Avg@n", [percent(of, "avg") for of in columns])
        for title, prefix in (("pass@n", "pass"), ("maj@n", "maj")):
            line(name, title, [percent(of, f"{prefix}@{of.get('n')}") for of in columns])
        for measure, (title, _) in DIVERSITY.items():
            line(name, title.lower(), [f"{of[measure]:.3f}" if measure in of else "" for of in columns])
        line(name, "rating", [f"{of['rating']:.0f}" if "rating" in of else "" for of in columns])
        line(name, "tokens", [f"{of['tokens_mean']:.0f}" if "tokens_mean" in of else "" for of in columns])
    means = [summary.get("math_six") for summary in summaries.values()]
    line("mean of the six", "Avg@n", ["" if mean is None else f"{100 * mean:.1f}" for mean in means])
    return "\n".join(lines)


__all__ = ["DIVERSITY_PNG", "QUALITY_PNG", "compare", "draw", "read_evaluation", "table"]
