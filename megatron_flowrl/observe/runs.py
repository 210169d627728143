"""What a run has left in its folder, read back for a report."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.config.keys import KEYS, show
from megatron_flowrl.config.recipe import read_recipe
from megatron_flowrl.observe.recorder import METRICS, SAMPLES

CONFIG = "config.yaml"
Course = Sequence[tuple[int, float]]
# Settings that differ between any two runs and say nothing of them.
_OF_THE_PLACE = re.compile(r"run\.folder|checkpoint\.save|logging\..*")
_TROUBLE = re.compile(r"skipped|failed|ungraded|truncated|lost|resent|restart|timeout|dropped|clamped|error")


@dataclass
class Run:
    """A run as its files tell it; `scalars` has what was finite, by room/name, in the order of the steps."""

    folder: Path
    settings: Mapping[str, Any]
    steps: Sequence[int]
    times: Sequence[float]
    scalars: Mapping[str, Course]
    not_finite: Mapping[str, int]
    samples: Mapping[int, Sequence[Mapping[str, Any]]]
    label: str = field(default="")

    @property
    def method(self) -> str:
        """`flowrl (scaled)`, `grpo`, `sft`; `?` where the configuration does not say."""
        if self.settings.get("sft.path") and not self.settings.get("prompts.path"):
            return "sft"
        name, preset = (str(self.settings.get(key, "?")) for key in ("objective.name", "objective.preset"))
        return f"{name} ({preset})" if name == "flowrl" else name

    def first_of(self, *names: str) -> Course:
        """The first of these scalars that the run has."""
        return next((self.scalars[name] for name in names if self.scalars.get(name)), ())


@dataclass(frozen=True)
class Trouble:
    """Something that was left out, cut off or went wrong in some steps of a run."""

    name: str
    steps: int
    mean: float
    largest: float
    at: int


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises UserError with all that is missing, folder by folder."""
    problems: list[str] = []
    runs = []
    for folder in folders:
        try:
            runs.append(_read(folder))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    for run, label in zip(runs, labels_of([run.folder for run in runs]), strict=True):
        run.label = label
    return runs


def different_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, as text, one value a run; of one run those that are no defaults."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not _OF_THE_PLACE.fullmatch(key))
    table = {key: [_shown(run.settings[key]) if key in run.settings else "" for run in runs] for key in keys}
    if len(runs) == 1:
        defaults = {name: _shown(key.default) for name, key in KEYS.items()}
        return {key: values for key, values in table.items() if values != [defaults.get(key)]}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def troubles(run: Run) -> list[Trouble]:
    """Of the scalars that count such things, those that were not 0 in every step."""
    found = []
    for name, course in sorted(run.scalars.items()):
        if _TROUBLE.search(name):
            hit = [(value, step) for step, value in course if value]
            if hit:
                largest, at = max(hit, key=lambda pair: abs(pair[0]))
                mean = sum(value for _, value in course) / len(course)
                found.append(Trouble(name, len(hit), mean, largest, at))
    return found


def missing_steps(run: Run) -> list[int]:
    """Steps between the first and the last that have no line."""
    return sorted(set(range(run.steps[0], run.steps[-1] + 1)) - set(run.steps))


def _read(folder: Path) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no run: there is no such folder; give the run.folder of a training run")
    absent = [name for name in (METRICS, CONFIG) if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{folder} is no run: it has no {' and no '.join(absent)}; give the run.folder of a training run"
        )
    by_step = {line["step"]: line for line in _lines(folder / METRICS)}
    if not by_step:
        raise UserError(f"{folder / METRICS} has no finished step; wait for the run's first one")
    problems: list[str] = []
    settings = {setting.key: setting.value for setting in read_recipe(folder / CONFIG, problems)}
    if problems:
        raise UserError(*problems)
    scalars: dict[str, list[tuple[int, float]]] = defaultdict(list)
    not_finite: Counter[str] = Counter()
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            if name in ("step", "time"):
                continue
            if _is_number(value):
                scalars[name].append((step, float(value)))
            elif value is None:
                not_finite[name] += 1
    samples: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    if (folder / SAMPLES).is_file():
        for line in _lines(folder / SAMPLES):
            samples[line["step"]].append(line)
    times = [line["time"] for _, line in sorted(by_step.items()) if _is_number(line.get("time"))]
    return Run(folder, settings, sorted(by_step), times, dict(scalars), not_finite, dict(samples))


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Lines of a step each; one that is cut off, as the last of a running or killed run may be, is passed over."""
    try:
        with open(path, "rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and type(line.get("step")) is int:
                    yield line
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; mend its permissions, or leave the run out"
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: object) -> str:
    return "null" if value is None else show(value)


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of those above as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


__all__ = [
    "CONFIG",
    "Course",
    "Run",
    "Trouble",
    "different_settings",
    "labels_of",
    "missing_steps",
    "read_runs",
    "troubles",
]
