"""One run that is killed again and again, started anew by the same command, and compared with one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.checkpoint.manifest import problem_with, read_manifest
from megatron_flowrl.platform.atomic import is_partial
from tests.chaos.processes import MARK, end_all, processes_of
from tests.distributed.ranks import REPOSITORY
from tests.tiny_tasks import SETTINGS
from tests.training.recorded import arguments, metrics_of

STEPS, SAVE_INTERVAL, RANKS = 10, 2, 2
_START_SECONDS, _STEP_SECONDS = 240.0, 240.0
_BY_ITSELF_SECONDS = 45.0  # in which what is left of a run has to end
_SHORT_LIVED = {"writer": 20.0}  # kinds that are waited for, in seconds
_ENDING = ("launcher", "rank")  # without these no run goes on
_IN_START = 0.25  # the share of kills that come before the first step
_BEGINS = re.compile(r"steps (\d+) to \d+|nothing is left to do")


@dataclass
class Kill:
    """What was killed, and what came of it."""

    mode: str
    seed: int
    victim: str
    step: int  # recorded when it was killed
    ended: bool  # whether the run ended by it
    checkpoint: int  # the newest one that was left
    seconds: float  # until the next step was recorded or the run had ended
    left: list[str] = field(default_factory=list)  # processes that had to be killed after it
    problems: list[str] = field(default_factory=list)


class Run:
    """A run of `megatron-flowrl train` that may be killed."""

    def __init__(self, folder: Path, mode: str, seed: int, given: list[str], only: str | None = None) -> None:
        self.folder, self._mode, self._seed = folder, mode, seed
        self._mark = f"{os.getpid()}_{seed}_{folder.name}"
        self._log = folder.with_name(f"{folder.name}.log")
        self._draw = random.Random(seed)
        self._arguments, self._only = given, only
        self._process: subprocess.Popen[bytes] | None = None
        self._from = 0  # where this start's output begins

    def start(self) -> None:
        """The command that a user gives."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), MARK: self._mark}
        environment["PYTHONFAULTHANDLER"] = "1"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
        self._from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "megatron_flowrl", *self._arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Whether the launcher is."""
        return self._process is not None and self._process.poll() is None

    def output(self) -> str:
        """Of this start."""
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    def steps(self) -> int:
        """The last one recorded."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def kill(self) -> Kill | None:
        """Kill one of its processes at a random moment and see what becomes of it; None where it ended before."""
        if self._draw.random() < _IN_START:
            self._wait(self._draw.uniform(0.0, 15.0 if self._mode == "replay" else 50.0))
        else:
            aim = self._begun() + self._draw.randint(1, 3)
            deadline = time.monotonic() + _START_SECONDS
            while self.running() and self.steps() < aim and time.monotonic() < deadline:
                time.sleep(0.005)
            self._wait(self._draw.expovariate(2.0))
        victim = self._victim()
        if victim is None:
            return None
        kind, number = victim
        step = self.steps()
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        began = time.monotonic()
        while self.running() and (kind in _ENDING or self.steps() <= step) and time.monotonic() < began + _STEP_SECONDS:
            time.sleep(0.02)
        seconds = time.monotonic() - began
        kill = Kill(self._mode, self._seed, kind, step, not self.running(), 0, round(seconds, 1))
        if self.running() and (kind in _ENDING or self.steps() <= step):
            kill.problems.append(f"no step and no end in {_STEP_SECONDS:.0f} s")
            kill.ended = True
        if kill.ended:
            kill.left = end_all(self._mark, 0.0 if kill.problems else _BY_ITSELF_SECONDS)
            self._process.wait() if self._process is not None else None
            kill.problems += damages(self.folder)
        steps = CheckpointFolder(self.folder / "checkpoints").steps()
        kill.checkpoint = steps[-1] if steps else 0
        return kill

    def check_start(self, checkpoint: int) -> list[str]:
        """Wait until this start says which step it begins with: the one after the newest checkpoint."""
        deadline = time.monotonic() + _START_SECONDS
        while not (found := _BEGINS.search(self.output())):
            if not self.running() or time.monotonic() > deadline:
                return [f"it did not start: {self.output()[-1500:]}"]
            time.sleep(0.05)
        first = int(found[1]) if found[1] else STEPS + 1
        return [] if first == checkpoint + 1 else [f"it begins with step {first}; the checkpoint is of {checkpoint}"]

    def finish(self) -> list[str]:
        """Wait for its end; what is wrong with it."""
        assert self._process is not None
        try:
            self._process.wait(STEPS * _STEP_SECONDS)
        except subprocess.TimeoutExpired:
            end_all(self._mark, 0.0)
            return ["it did not end"]
        left = end_all(self._mark, _BY_ITSELF_SECONDS)
        problems = [f"left running: {', '.join(left)}"] if left else []
        return problems if self._process.returncode == 0 else [*problems, f"it failed: {self.output()[-1500:]}"]

    def _begun(self) -> int:
        steps = CheckpointFolder(self.folder / "checkpoints").steps()
        return max(self.steps(), steps[-1] if steps else 0)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _victim(self) -> tuple[str, int] | None:
        """A kind at random among those that live or will, then one of its processes."""
        kinds = sorted({*processes_of(self._mark), *_SHORT_LIVED} - {"resource tracker", "other"})
        kind = self._only or self._draw.choice(kinds)
        deadline = time.monotonic() + _SHORT_LIVED.get(kind, 0.0)
        while self.running():
            found = processes_of(self._mark)
            if kind in found:
                return kind, self._draw.choice(found[kind]).id
            if time.monotonic() > deadline and self._only is None:
                kind, deadline = "rank", time.monotonic() + 5.0
        return None


def command(task: Path, folder: Path, records: Path | None) -> list[str]:
    """Of `megatron-flowrl`: everything a run has, on recorded answers where `records` are given."""
    settings: dict[str, Any] = {
        "run__steps": STEPS,
        "checkpoint__save_interval": SAVE_INTERVAL,
        "optimizer__lr_decay_style": "cosine",
        "optimizer__lr_decay_iters": STEPS,
        "optimizer__lr_warmup_iters": 2,
    }
    if records is not None:
        return arguments(task, records, folder, **settings)
    sampled = SETTINGS | {
        "model.path": task / "model",
        "prompts.path": task / "train.jsonl",
        "evaluation.path": task / "test.jsonl",
        "evaluation.interval": 4,
        "evaluation.n": 2,
        "run.folder": folder,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return ["train", *(f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in sampled.items())]


def damages(folder: Path) -> list[str]:
    """What is wrong with the checkpoints that count."""
    found = []
    root = CheckpointFolder(folder / "checkpoints")
    for step in root.steps():
        try:
            manifest = read_manifest(root.path_of(step))
        except Exception as error:
            found.append(f"checkpoint of step {step}: {error}")
            continue
        problems = (problem_with(root.path_of(step), name, record) for name, record in manifest.files.items())
        found += [f"checkpoint of step {step}: {problem}" for problem in problems if problem]
    return found


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Between two runs that ended: weights, optimizer and log Z bit by bit, and what was recorded of the steps."""
    expected, found = _state_of(undisturbed), _state_of(run)
    problems = [] if list(expected) == list(found) else ["the checkpoints hold other tensors"]
    problems += [
        f"{name} differs" for name in expected if name in found and not torch.equal(expected[name], found[name])
    ]
    lines, others = ([line for line in metrics_of(one) if line["step"] > 0] for one in (run, undisturbed))
    for line, other in zip(lines, others, strict=True):
        names = [name for name in other if name == "step" or name.startswith(("update/", "rollout/"))]
        problems += [
            f"step {other['step']}: {name} is {line.get(name)}, not {other[name]}"
            for name in names
            if line.get(name) != other[name] and not name.startswith("rollout/version")
        ]
    return problems


def leftovers(run: Path) -> list[str]:
    """What should not be in the folder of a run that ended."""
    problems = [f"{path.relative_to(run)} is left" for path in run.rglob("*") if is_partial(path)]
    steps = [line["step"] for line in metrics_of(run) if line["step"] > 0]
    if steps != [*range(1, STEPS + 1)]:
        problems.append(f"the steps recorded are {steps}")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = [event.step for event in events.Scalars("update/loss")]
    if shown != [*range(1, STEPS + 1)]:
        problems.append(f"the steps in TensorBoard are {shown}")
    for path in run.glob("*.jsonl"):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            try:
                json.loads(line)
                whole = line.endswith(b"\n")
            except ValueError:
                whole = False
            if not whole:
                problems.append(f"line {number} of {path.name} is cut off")
    return problems


def _state_of(run: Path) -> dict[str, torch.Tensor]:
    out = run.with_name(f"{run.name}.pt")
    dcp_to_torch_save(run / "checkpoints" / f"step_{STEPS:08d}", out)
    content = torch.load(out, weights_only=False)
    out.unlink()
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


__all__ = ["STEPS", "Kill", "Run", "damages", "differences", "leftovers"]
