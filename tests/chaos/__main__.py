"""Kill -9 of any process of a run, at any moment, again and again: the end must be that of a run that was left alone.

    python -m tests.chaos --kills 20 --seed 1                 # recorded answers, without a sampler
    python -m tests.chaos --kills 5 --seed 1 --sampler        # with vLLM

Each call adds to the results file. Victims are drawn among the kinds that live at that moment (launcher, ranks,
checkpoint writers; with --sampler also vLLM's processes, graders and their guards); a quarter of the kills come before
a start's first step. After each: every checkpoint has its checksums; a run that ended begins, by the same command, with
the step after its newest checkpoint. After a run's last step: weights, optimizer and metrics are, bit by bit, those of
an undisturbed run on the same answers, no file is half-written, no process is left.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_flowrl.platform.atomic import write_file
from tests.chaos.episode import STEPS, Run, command, differences, leftovers
from tests.tiny_tasks import save_task
from tests.training.recorded import write_records

RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how many more")
    parser.add_argument("--seed", type=int, default=1, help="of victims and moments")
    parser.add_argument("--sampler", action="store_true", help="with vLLM")
    parser.add_argument("--only", metavar="KIND", help="of victims, such as launcher; else they are drawn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON that is added to")
    parser.add_argument("--folder", type=Path, help="where runs are kept; else they are deleted when they were right")
    given = parser.parse_args()
    mode = "sampler" if given.sampler else "replay"
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos_"))
    folder.mkdir(parents=True, exist_ok=True)
    task = save_task(folder / "task", prompts=4 * STEPS)
    write_records(task, task / "records", STEPS)
    undisturbed = None
    kills, number, wrong = 0, 0, False
    while kills < given.kills and not wrong:
        number += 1
        seed = given.seed * 1000 + number
        place = folder / f"{mode}_{seed}"
        run = Run(place, mode, seed, command(task, place, None if given.sampler else task / "records"), given.only)
        done, problems = episode(run, given.kills - kills)
        kills += len(done)
        if not problems:
            if mode == "sampler" or undisturbed is None:
                records = run.folder / "rollouts" if mode == "sampler" else task / "records"
                undisturbed = alone(task, folder / f"undisturbed_{seed}", records)
            problems = [*leftovers(run.folder), *differences(run.folder, undisturbed)]
        wrong = bool(problems) or any(kill["problems"] for kill in done)
        add(given.results, done, {"mode": mode, "seed": seed, "kills": len(done), "problems": problems})
        print(f"run {number}: {len(done)} kills, {problems or 'as if nothing had happened'}", flush=True)
    if not wrong and given.folder is None:
        shutil.rmtree(folder)
    print(summary(json.loads(given.results.read_text())))
    return 1 if wrong else 0


def episode(run: Run, most: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A run until its end, with at most so many kills; what they did, and what was wrong with its end."""
    done: list[dict[str, Any]] = []
    run.start()
    while len(done) < most:
        kill = run.kill()
        if kill is None:
            break
        if kill.ended:
            run.start()
            kill.problems += run.check_start(kill.checkpoint)
        done.append(asdict(kill))
        print(f"  {kill}", flush=True)
        if kill.problems:
            break
    return done, run.finish()


def alone(task: Path, folder: Path, records: Path) -> Path:
    """A run on these answers that nobody disturbs."""
    run = Run(folder, "replay", 0, command(task, folder, records))
    run.start()
    problems = run.finish()
    if problems:
        raise SystemExit(f"the undisturbed run: {problems}")
    return folder


def add(path: Path, kills: list[dict[str, Any]], run: dict[str, Any]) -> None:
    """To the results file, whole or not at all."""
    known = json.loads(path.read_text()) if path.exists() else {"kills": [], "runs": []}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"commit": commit, "date": time.strftime("%Y-%m-%d")}
    write_file(
        path, json.dumps({"kills": known["kills"] + kills, "runs": [*known["runs"], run | about]}, indent=1) + "\n"
    )


def summary(results: dict[str, Any]) -> str:
    """For people."""
    kills, runs = results["kills"], results["runs"]
    victims = ", ".join(f"{kind} {count}" for kind, count in Counter(kill["victim"] for kill in kills).most_common())
    problems = sum(bool(one["problems"]) for one in [*kills, *runs])
    left = sum(bool(kill["left"]) for kill in kills)
    return (
        f"{len(kills)} kills in {len(runs)} runs ({victims}); {sum(kill['ended'] for kill in kills)} ended the run; "
        f"{left} left processes that did not end by themselves; problems: {problems}"
    )


if __name__ == "__main__":
    sys.exit(main())
