"""FlowRL and the methods it is compared with, from one warm start, with the same number of samples.

    python -m examples.countdown.compare [--folder runs/compare] [--seeds 3] [--methods flowrl_exact grpo]

Runs that are finished are not run again. Writes result.json, compare.png and report.html.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.countdown import commands
from examples.countdown.exact import log_probs_of, measures
from examples.countdown.figure import draw
from examples.countdown.methods import BETA, METHODS
from examples.countdown.task import reward_of

COLUMNS = {
    "accuracy": "accuracy",
    "distinct_correct": "distinct of 16",
    "coverage": "coverage",
    "entropy": "entropy",
    "kl": "KL to target",
}

# Longer than the demo: what maximising reward does to the ways of solving shows with time. And from a start that makes
# fewer slips, which cost most whoever keeps all ways.
_WARM_START = ("run.steps=8000", "optimizer.lr_decay_iters=8000")
_OF_ALL = ("run.steps=60", "optimizer.lr_decay_iters=60", "evaluation.interval=30", "checkpoint.save_interval=30")


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give one at least")
    folder: Path = options.folder.absolute()
    data, start = folder / "data", folder / "warm_start"
    commands.prepare(data)
    commands.warm_start(data, start, *_WARM_START)
    runs = [(name, seed) for seed in range(options.seeds) for name in options.methods]
    began = time.monotonic()
    for number, (name, seed) in enumerate(runs):
        each = (time.monotonic() - began) / number / 60 if number else None
        left = "" if each is None else f", about {each * (len(runs) - number):.0f} min left"
        print(f"\n[{number + 1}/{len(runs)}] {name}, seed {seed}{left}", flush=True)
        commands.train(data, start, folder / f"{name}_{seed}", "test", *settings_of(name, seed, options.overrides))
    result = gather(folder, data, start, runs)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    draw(result, folder / "compare.png")
    commands.report([folder / f"{name}_0" for name in options.methods], folder / "report.html")
    print(f"result.json, compare.png and report.html are in {folder}")


def settings_of(name: str, seed: int, overrides: Sequence[str]) -> list[str]:
    """Of one run; the later of two for the same key counts."""
    given = [*METHODS[name], f"seed={seed}", *_OF_ALL, *overrides]
    return [*{setting.partition("=")[0]: setting for setting in given}.values()]


def gather(folder: Path, data: Path, start: Path, runs: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """{"start": {measure: value}, "methods": {method: {measure: {"mean", "seeds"}}}}, on the test problems."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    tokenizer = data / "model"
    before = log_probs_of(start / "checkpoints", tokenizer, rows)
    rewards = [[reward_of(writing) for writing in row["writings"]] for row in rows]
    found: dict[str, dict[str, list[float]]] = {}
    first: list[dict[str, float]] = []
    for name, seed in runs:
        run = folder / f"{name}_{seed}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        sampled = [line for line in lines if "evaluation/accuracy" in line]
        first.append(_sampled(sampled[0]))
        exact = measures(log_probs_of(run / "checkpoints", tokenizer, rows), before, rewards, BETA)
        for measure, value in {**_sampled(sampled[-1]), **exact, "samples": _samples(lines)}.items():
            found.setdefault(name, {}).setdefault(measure, []).append(value)
    began = {measure: fmean(one[measure] for one in first) for measure in first[0]}
    return {
        "start": {**began, **measures(before, before, rewards, BETA)},
        "methods": {
            name: {measure: {"mean": fmean(values), "seeds": values} for measure, values in of.items()}
            for name, of in found.items()
        },
        "settings": {name: list(METHODS[name]) for name in found},
        "beta": BETA,
        "problems": len(rows),
    }


def table(result: Mapping[str, Any]) -> str:
    """Means over seeds, as Markdown."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    rows = {"warm start": result["start"]}
    rows |= {name: {m: of[m]["mean"] for m in COLUMNS} for name, of in result["methods"].items()}
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(f'{of[m]:.3f}' for m in COLUMNS)} |" for name, of in rows.items())]
    )


def _sampled(line: Mapping[str, float]) -> dict[str, float]:
    return {name: line[f"evaluation/{name}"] for name in ("accuracy", "distinct_correct", "coverage", "solved")}


def _samples(lines: Sequence[Mapping[str, float]]) -> float:
    """Answers that were sampled to train on."""
    return sum(line.get("mismatch/sequences", 0.0) for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every run")
    return parser


if __name__ == "__main__":
    main()
