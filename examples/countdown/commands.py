"""The program's commands as the demo and the comparison give them, with two ranks on one machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from examples.countdown.prepare import STAMP, stamp

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
RANKS = 2


def prepare(folder: Path) -> None:
    """Model, tokenizer and data, unless they are there. Ends the program where what is there is of another task."""
    if not (folder / "sft.jsonl").is_file():
        run([sys.executable, "-m", "examples.countdown.prepare", str(folder)])
        return
    made = folder / STAMP
    if not made.is_file() or json.loads(made.read_text()) != stamp():
        sys.exit(f"{folder} was made for another form of the task: delete {folder.parent}, or give another --folder")


def warm_start(data: Path, folder: Path, *overrides: str) -> None:
    """Supervised training, from where it is."""
    settings = [f"run.folder={folder}", f"model.path={data / 'model'}", f"sft.path={data / 'sft.jsonl'}"]
    run([*_torchrun(), "sft", str(HERE / "sft.yaml"), *settings, *overrides])


def train(data: Path, start: Path, folder: Path, held_out: str, *overrides: str) -> None:
    """Reinforcement learning from a warm start, from where it is; evaluated on the split `held_out`."""
    settings = [
        f"run.folder={folder}",
        f"model.path={start / 'checkpoints'}",
        f"prompts.path={data / 'train.jsonl'}",
        f"evaluation.path={data / held_out}.jsonl",
    ]
    run([*_torchrun(), "train", str(HERE / "train.yaml"), *settings, *overrides])


def report(runs: list[Path], output: Path) -> None:
    """The runs in one HTML file."""
    run([sys.executable, "-m", "megatron_flowrl", "report", *map(str, runs), "--output", str(output)])


def run(command: list[str]) -> None:
    """Say a command and run it; where it fails, so does this program."""
    print(f"$ {shlex.join(['python' if part == sys.executable else part for part in command])}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment)
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def _torchrun() -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    return [*launcher, "-m", "megatron_flowrl"]


__all__ = ["REPOSITORY", "prepare", "report", "run", "train", "warm_start"]
