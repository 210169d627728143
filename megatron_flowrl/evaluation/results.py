"""What an evaluation leaves in its folder: graded answers, and the numbers over them.

NAME.jsonl      a benchmark's answers, a line each (`GradedText`)
summary.json    {"plan": .., "benchmarks": {NAME: numbers of `summarize`}, "math_six": mean}
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.evaluation.diversity import clusters, distinct_finals, distinct_n, self_bleu
from megatron_flowrl.evaluation.estimates import bootstrap_interval, majority, pass_at_k
from megatron_flowrl.platform.atomic import write_file

SUMMARY = "summary.json"
REFUSED = "refused"
"""`finish_reason` of an answer that a server would not give; it is asked for again."""

Numbers = Mapping[str, Mapping[str, Any]]
"""Benchmark -> the numbers of `summarize`."""

DIVERSITY: Mapping[str, tuple[str, str]] = {
    "judged": ("Judged diversity", "1 (all alike) to 5"),
    "distinct_finals": ("Distinct final answers", "of a problem's answers"),
    "clusters": ("Clusters of wording", "of a problem's answers"),
    "distinct_2": ("Distinct pairs of words", "share of all pairs"),
    "self_bleu": ("Self-BLEU", "1: all answers alike"),
}
"""Measures of it: title and unit."""


@dataclass(frozen=True)
class GradedText:
    """A line of an answers' file."""

    id: str
    sample: int
    response: str
    tokens: int
    finish_reason: str
    score: float
    key: str | None
    problem: str | None


def read_answers(file: Path, *, repair: bool = False) -> list[GradedText]:
    """Lines of an earlier run; of several of an answer, the last.

    The file's last line may be cut off: with `repair` it is taken off, to be written anew.
    """
    if not file.exists():
        return []
    try:
        lines = [_graded_text(json.loads(line)) for line in whole_lines(file, repair=repair)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} has lines that are none of an evaluation's ({error}); give another --output"
        ) from error
    return [*{(one.id, one.sample): one for one in lines}.values()]


def whole_lines(file: Path, *, repair: bool) -> list[str]:
    """Lines of a file that is appended to; a last one that was cut off is left out, or with `repair` off the file."""
    whole, _, rest = file.read_text(encoding="utf-8").rpartition("\n")
    if rest and repair:
        write_file(file, whole + "\n" if whole else "")
    return whole.split("\n") if whole else []


def _graded_text(line: Any) -> GradedText:
    one = GradedText(**line)
    texts = (one.id, one.response, one.finish_reason)
    good = all(isinstance(text, str) for text in texts) and type(one.sample) is type(one.tokens) is int
    if not good or not isinstance(one.score, int | float) or not math.isfinite(one.score):
        raise TypeError("a field is of another kind")
    return one


def summarize(answers: Sequence[GradedText], ids: Sequence[str], correct_from: float) -> dict[str, Any]:
    """Numbers over problems, each with an answer of equal number n.

    avg: Avg@n, the share of right answers; pass@k for k = 1, 2, 4 .. n; maj@n, where the grader knows final answers;
    distinct_finals, distinct_2, clusters, self_bleu: `diversity.py`'s measures; a 95% interval of each over problems
    (`*_interval`); answers' length in tokens, and the shares that were cut off and that could not be graded.
    """
    of: dict[str, list[GradedText]] = defaultdict(list)
    for answer in answers:
        of[answer.id].append(answer)
    groups = [sorted(of[one], key=lambda answer: answer.sample) for one in ids if one in of]
    if not groups:
        return {"problems": 0}
    right = [[answer.score >= correct_from for answer in group] for group in groups]
    n = min(map(len, groups))
    by_problem: dict[str, list[float]] = {"avg": [fmean(group) for group in right]}
    for k in [2**power for power in range(n.bit_length()) if 2**power < n] + [n]:
        by_problem[f"pass@{k}"] = [pass_at_k(len(group), sum(group), k) for group in right]
    keys = [[answer.key for answer in group] for group in groups]
    if any(key is not None for group in keys for key in group):
        by_problem[f"maj@{n}"] = [majority(some, rights) for some, rights in zip(keys, right, strict=True)]
        by_problem["distinct_finals"] = [float(distinct_finals(some)) for some in keys]
    texts = [[answer.response for answer in group] for group in groups]
    by_problem["distinct_2"] = [distinct_n(some, 2) for some in texts]
    by_problem["clusters"] = [float(clusters(some)) for some in texts]
    if n > 1:
        by_problem["self_bleu"] = [self_bleu(some) for some in texts]
    found: dict[str, Any] = {"problems": len(groups), "n": n}
    for name, values in by_problem.items():
        found[name] = fmean(values)
        found[f"{name}_interval"] = bootstrap_interval(values)
    return found | {
        "tokens_mean": fmean(answer.tokens for answer in answers),
        "truncated_share": fmean(answer.finish_reason == "length" for answer in answers),
        "ungraded_share": fmean(answer.problem is not None for answer in answers),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The benchmarks, a line each, as Markdown."""
    lines = ["| | problems | Avg@n | pass@n | maj@n | tokens | cut off | not graded |", "| --- |" + " ---: |" * 7]
    for name, of in summary["benchmarks"].items():
        n = of.get("n")
        cells = [str(of["problems"]), *(percent(of, measure) for measure in ("avg", f"pass@{n}", f"maj@{n}"))]
        if n:
            cells += [
                f"{of['tokens_mean']:.0f}",
                *(f"{of[share]:.1%}" for share in ("truncated_share", "ungraded_share")),
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if "math_six" in summary:
        lines.append(f"| mean of the six | | {100 * summary['math_six']:.1f} | | | | | |")
    return "\n".join(lines)


def percent(of: Mapping[str, Any], measure: str) -> str:
    """A share and its interval, as `75.0 (50.0 - 100.0)`; nothing where there is none."""
    if measure not in of:
        return ""
    low, high = of[f"{measure}_interval"]
    return f"{100 * of[measure]:.1f} ({100 * low:.1f} - {100 * high:.1f})"


__all__ = ["DIVERSITY", "SUMMARY", "GradedText", "Numbers", "percent", "read_answers", "summarize", "table"]
