"""Tasks of reasoning-gym as prompts with their entries: `python -m examples.reasoning_gym.prepare FILE [TASK ...]`.

Needs reasoning-gym (pip install -e '.[reasoning-gym]'). The same seed makes the same file, for most tasks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

INSTRUCTION = "\n\nThink first. Then give the final answer between <answer> and </answer>."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("tasks", nargs="*", default=["chain_sum", "leg_counting", "basic_arithmetic"])
    parser.add_argument("--size", type=int, default=1000, help="entries of each task; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="another one for held-out prompts; default: 0")
    given = parser.parse_args()
    try:
        import reasoning_gym
    except ImportError as error:
        sys.exit(f"reasoning-gym cannot be imported ({error}): pip install -e '.[reasoning-gym]'")
    known = reasoning_gym.factory.DATASETS
    unknown = [task for task in given.tasks if task not in known]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no task of reasoning-gym; there are {', '.join(sorted(known))}")
    try:
        with given.file.open("w", encoding="utf-8") as lines:
            for task in given.tasks:
                for entry in reasoning_gym.create_dataset(task, size=given.size, seed=given.seed):
                    row = {"prompt": entry["question"] + INSTRUCTION, "ground_truth": {"dataset": task, "entry": entry}}
                    lines.write(f"{json.dumps(row, default=str)}\n")
    except OSError as error:
        sys.exit(f"{given.file} cannot be written: {error.strerror}")
    print(f"{given.file}: {given.size} entries each of {', '.join(given.tasks)}")


if __name__ == "__main__":
    main()
