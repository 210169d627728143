#!/usr/bin/env python3
"""Submit a training run with the sizes that its recipe needs, and ask how it is doing.

    scripts/slurm/submit.py train recipe.yaml run.folder=/shared/runs/one --gpus-per-node 8 --nodes 4 --time 12:00:00
    scripts/slurm/submit.py train recipe.yaml run.folder=/shared/runs/one --gpus-per-node 8 --sampler-nodes 2 --chain 3
    scripts/slurm/submit.py status /shared/runs/one

What does not fit is refused before anything is queued. What follows `--` goes to sbatch as it is: -- --account=a. The
script is train.sbatch beside this file; the variables that it knows are in common.sh.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME))

try:
    from megatron_flowrl.cli import TRAIN_SECTIONS
    from megatron_flowrl.config import Config, UserError, check_config, load_config, sizes_of
    from megatron_flowrl.observe.status import status_of
except ImportError as error:  # another python than the environment's
    own = HOME / ".venv" / "bin" / "python"
    if own.is_file() and not os.environ.get("_FLOWRL_SUBMIT"):
        os.execve(own, [str(own), *sys.argv], {**os.environ, "_FLOWRL_SUBMIT": "1"})
    sys.exit(
        f"submit.py: error: {sys.executable} cannot import the program ({error}); make install, or call its python"
    )

SCRIPT = HOME / "scripts" / "slurm" / "train.sbatch"
_MARGIN_SECONDS = 60.0  # SLURM gives notice up to so much too early or late
_NAME = re.compile(r"[\w.-]+")


def command_of(given: argparse.Namespace, config: Config, more: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """sbatch's command line, and what it is to find in its environment. Raises UserError."""
    folder = Path(config.run.folder)
    if not folder.is_absolute():
        raise UserError(f"run.folder = {config.run.folder!r} has to be absolute, on a file system that all nodes share")
    sizes = sizes_of(config, given.gpus_per_node, given.nodes, given.sampler_nodes)
    name = given.name or f"flowrl-{folder.name}"
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name} cannot be a job's: letters, digits and . _ - alone; give another")
    environment = {
        "FLOWRL_HOME": str(HOME),
        "FLOWRL_SAMPLER_NODES": str(sizes.serving),
        "FLOWRL_SERVE_ON_ALL": "1" if config.rollout.colocated and sizes.training > 1 else "",
        "FLOWRL_RANKS_PER_NODE": str(sizes.per_node),
    }
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--nodes={sizes.nodes}"]
    command += [f"--gpus-per-node={sizes.per_node}", f"--output={folder}/slurm/%x-%j.log"]
    command += [f"--signal=B:USR1@{given.notice}", f"--chdir={os.getcwd()}"]
    command += [f"--time={given.time}"] if given.time else []
    recipe = [str(Path(text).resolve()) if "=" not in text else text for text in given.settings]
    if not any(text.startswith("run.folder=") for text in recipe):  # the recipe has it, which the script does not read
        recipe.append(f"run.folder={folder}")
    return [*command, *more, str(SCRIPT), *recipe], environment


def train(given: argparse.Namespace, more: Sequence[str]) -> None:
    """Submit, or with --dry-run say what would be. Raises UserError."""
    recipes = [text for text in given.settings if "=" not in text]
    if len(recipes) > 1:
        raise UserError(f"one recipe is wanted, and {', '.join(recipes)} were given")
    config = load_config(
        next(iter(recipes), None), [text for text in given.settings if "=" in text], TRAIN_SECTIONS, "train"
    )
    check_config(config)
    if given.notice <= _MARGIN_SECONDS:
        raise UserError(f"--notice {given.notice}: SLURM looks once in a while; give more than {_MARGIN_SECONDS:.0f} s")
    if given.chain < 1:
        raise UserError(f"--chain {given.chain}: one job at least")
    command, environment = command_of(given, config, more)
    if given.dry_run:
        print(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command]))
        return
    Path(config.run.folder, "slurm").mkdir(parents=True, exist_ok=True)
    if given.test_only:
        _sbatch([command[0], "--test-only", *command[1:]], environment)
        return
    after = None
    for number in range(given.chain):
        waiting = [f"--dependency=afterany:{after}"] if after is not None else []
        after = _sbatch([*command[:2], *waiting, *command[2:]], environment).partition(";")[0]
        print(f"job {after}" + (f", after job {number} of the chain" if number else ""))


def status(given: argparse.Namespace) -> None:
    """The run's own, and SLURM's jobs of its name. Raises UserError."""
    folder = Path(given.run).absolute()
    print(f"{folder}: {status_of(folder).line()}")
    failures = folder / "slurm" / "failures"
    if failures.is_file() and failures.read_text().strip() not in ("", "0"):
        print(f"starts in a row that failed without a new checkpoint: {failures.read_text().strip()}")
    name = given.name or f"flowrl-{folder.name}"
    form = "%.10i %.9P %.20j %.8T %.10M %.10l %.6D %R"
    try:
        found = subprocess.run(["squeue", "--me", f"--name={name}", f"--format={form}"], capture_output=True, text=True)
        print(found.stdout.rstrip() if found.returncode == 0 else f"squeue: {found.stderr.strip()}")
    except FileNotFoundError:
        print("squeue is not on this machine: nothing is known of the run's jobs")
    logs = sorted((folder / "slurm").glob("*.log"), key=lambda path: path.stat().st_mtime)
    if logs:
        print(f"newest log: {logs[-1]}")


def _sbatch(command: Sequence[str], environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("sbatch is not on this machine; submit from a login node, or see --dry-run") from None
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        raise UserError(f"sbatch refused (status {done.returncode}): {shlex.join(command)}")
    return done.stdout.strip()


def _training_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py train", description="Submit a run; what follows `--` goes to sbatch as it is."
    )
    parser.add_argument("settings", nargs="+", metavar="recipe.yaml | section.key=value")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="which all train, or all serve")
    parser.add_argument("--nodes", type=int, help="that train (default: as few as the recipe's layout takes)")
    parser.add_argument("--sampler-nodes", type=int, default=0, help="that serve vLLM and do not train (default: 0)")
    parser.add_argument("--time", help="time limit, as SLURM writes it")
    parser.add_argument("--notice", type=int, default=300, help="seconds before it that the run saves (default: 300)")
    parser.add_argument("--chain", type=int, default=1, help="jobs, each after the last, that go on (default: 1)")
    parser.add_argument("--name", help="the jobs' (default: flowrl-RUN)")
    parser.add_argument("--dry-run", action="store_true", help="print the command, and submit nothing")
    parser.add_argument("--test-only", action="store_true", help="have SLURM say when it could start, and no more")
    return parser


def _status_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="submit.py status", description="How a run and its jobs are doing.")
    parser.add_argument("run", help="its folder")
    parser.add_argument("--name", help="the jobs' (default: flowrl-RUN)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with status 2 and a message where what is asked for cannot be."""
    texts = list(sys.argv[1:] if arguments is None else arguments)
    place = texts.index("--") if "--" in texts else len(texts)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "status"), help="see train --help, status --help")
    parser.parse_args(texts[:1])
    try:
        if texts[0] == "train":
            train(_training_parser().parse_intermixed_args(texts[1:place]), texts[place + 1 :])
        else:
            status(_status_parser().parse_args(texts[1:place]))
    except UserError as error:
        print(f"submit.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
