"""All methods on all tasks, two at a time: `python -m examples.distribution_matching`, or `make figure1`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.distribution_matching.methods import METHODS, SCHEDULES, Schedule, settings_of
from examples.distribution_matching.tasks import TASKS
from examples.distribution_matching.workers import run_all

OUT = Path("runs/distribution_matching")
COLUMNS = ("kl_target_policy", "kl_policy_target", "modes_covered", "log_z_error")


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, write result.json, curves.json and the figures, print the table."""
    options = _parser().parse_args(arguments)
    schedules = {task: replace(SCHEDULES[task], steps=options.steps or SCHEDULES[task].steps) for task in options.tasks}
    runs = [(task, name) for task in options.tasks for name in options.methods if task in METHODS[name].tasks]
    if not runs:
        sys.exit(f"none of {', '.join(options.methods)} is run on {', '.join(options.tasks)}")
    started = time.perf_counter()
    outcomes = run_all(runs, schedules, options.seed)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {task: {} for task in options.tasks}
    for task, name in runs:
        result[task][name] = outcomes[task, name].figures
    result["about"] = _about(runs, schedules, options.seed, outcomes, seconds)
    curves = {
        "kl_target_policy": {
            task: {name: outcomes[task, name].course for t, name in runs if t == task} for task in options.tasks
        },
        "mixture": {name: outcomes[task, name].policy[0].tolist() for task, name in runs if task == "mixture"},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "curves.json").write_text(json.dumps(curves) + "\n")
    print(table(result))
    _draw(curves, result, options.out)
    print(f"{len(runs)} runs in {seconds / 60:.1f} minutes; result.json, curves.json and figures in {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.distribution_matching", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to run; default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    steps = ", ".join(f"{schedule.steps} of {task}" for task, schedule in SCHEDULES.items())
    parser.add_argument("--steps", type=_steps, help=f"training steps of every run, 2 or more; default: {steps}")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples; default: 0")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the result and figures; default: {OUT}")
    return parser


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 2:
        raise argparse.ArgumentTypeError(f"{steps} steps; a course of the learning rate takes 2 or more")
    return steps


def _about(
    runs: list[tuple[str, str]],
    schedules: dict[str, Schedule],
    seed: int,
    outcomes: dict[tuple[str, str], Any],
    seconds: float,
) -> dict[str, Any]:
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "units": "KL in nats, mean over prompts; log_z_error: mean over prompts of |learned log Z - log_partition|",
        "mode_covered": "the policy has at least a tenth of the target's mass around the mode",
        "rewards": {
            "log_target": "log of the un-normalised target, no floor: nothing underflows",
            "target": "the un-normalised target itself",
        },
        "tasks": {
            task: {
                **asdict(schedule),
                "prompts": len(TASKS[task].prompts),
                "answers_to_a_prompt": TASKS[task].log_target.shape[1],
                "modes": TASKS[task].num_modes,
                "log_partition": TASKS[task].log_partition.tolist(),
            }
            for task, schedule in schedules.items()
        },
        "methods": {
            name: {
                "reward": METHODS[name].reward,
                "settings": settings_of(name, next(schedules[t] for t, n in runs if n == name), seed),
                "skipped_updates": {task: outcomes[task, n].skipped_updates for task, n in runs if n == name},
            }
            for name in dict.fromkeys(name for _, name in runs)
        },
    }


def table(result: dict[str, Any]) -> str:
    """The figures of every run, in Markdown."""
    lines = ["| task | method | KL(target, policy) | KL(policy, target) | modes covered | log Z error |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for task, facts in result["about"]["tasks"].items():
        for name, figures in result[task].items():
            forward, backward, covered, error = (figures[column] for column in COLUMNS)
            shown = "-" if error is None else f"{error:.4f}"
            lines.append(
                f"| {task} | {name} | {forward:.4f} | {backward:.4f} | {covered} of {facts['modes']} | {shown} |"
            )
    return "\n".join(lines)


def _draw(curves: dict[str, Any], result: dict[str, Any], out: Path) -> None:
    from examples.distribution_matching.figure import draw_courses, draw_distributions

    if curves["mixture"]:
        kl = {name: figures["kl_target_policy"] for name, figures in result["mixture"].items()}
        draw_distributions(curves["mixture"], kl, out / "figure1.png")
    draw_courses(curves["kl_target_policy"], out / "training.png")


if __name__ == "__main__":
    main()
