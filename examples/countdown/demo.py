"""The demo: a model from nothing, a warm start, FlowRL through vLLM, and a report.

    python -m examples.countdown.demo [--folder runs/demo] [--fp8 blockwise]

About thirteen minutes on two cores. Whatever was cut off goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from examples.countdown import commands
from examples.countdown.methods import METHODS

FLOWRL = METHODS["flowrl_exact"]
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
_SHOWN = ("accuracy", "distinct_correct", "coverage")
_MINUTES = {"prepare": 0.5, "warm start": 9.0, "FlowRL": 3.2, "report": 0.2}  # measured on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--fp8", choices=RECIPES, help="FlowRL with layers in FP8 by this recipe; on a CPU it is emulated, and slower"
    )
    given = parser.parse_args()
    folder: Path = given.folder.absolute()
    precision = () if given.fp8 is None else fp8(given.fp8)
    data, start = folder / "data", folder / "warm_start"
    stages: dict[str, Callable[[], None]] = {
        "prepare": lambda: commands.prepare(data),
        "warm start": lambda: commands.warm_start(data, start),
        "FlowRL": lambda: commands.train(data, start, folder, "test", *FLOWRL, *precision),
        "report": lambda: commands.report([folder], folder / "report.html"),
    }
    began = time.monotonic()
    for number, (name, stage) in enumerate(stages.items(), start=1):
        left = sum(minutes for other, minutes in _MINUTES.items() if [*stages].index(other) >= number - 1)
        took = (time.monotonic() - began) / 60
        print(f"\n[{number}/{len(stages)}] {name}; {took:.1f} min over, about {left:.0f} min left", flush=True)
        stage()
    print(f"\n{summary(folder)}\n{folder / 'report.html'} has all of it; {(time.monotonic() - began) / 60:.1f} minutes")


def fp8(recipe: str) -> tuple[str, ...]:
    """Settings: gradients in e5m2, as fits scales of whole tensors, or, by blocks, all in e4m3."""
    form = "hybrid" if recipe in ("tensorwise", "delayed") else "e4m3"
    return "precision.dtype=bfloat16", f"precision.fp8={form}", f"precision.fp8_recipe={recipe}"


def summary(folder: Path) -> str:
    """What became of the warm start, on problems that were never trained on."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "evaluation/accuracy" in line]
    first, last = evaluated[0], evaluated[-1]
    course = {name: f"{first[f'evaluation/{name}']:.2f} -> {last[f'evaluation/{name}']:.2f}" for name in _SHOWN}
    return (
        f"held-out problems: accuracy {course['accuracy']}, distinct right answers of 16 {course['distinct_correct']}, "
        f"as a share of all that there are {course['coverage']}"
    )


if __name__ == "__main__":
    main()
