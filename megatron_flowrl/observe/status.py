"""How far a run has come, by its folder; for people, and for the scripts that decide whether it goes on."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_flowrl.config import UserError
from megatron_flowrl.config.recipe import read_recipe
from megatron_flowrl.observe.line import duration
from megatron_flowrl.observe.recorder import METRICS
from megatron_flowrl.observe.runs import CONFIG

_LATEST = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class RunStatus:
    """Steps. `recorded` may be above `saved`: what is between is done again after a failure."""

    saved: int
    recorded: int
    steps: int | None
    """Of the whole run; None where it has not begun."""

    age: float | None
    """Seconds since the last recorded step."""

    @property
    def finished(self) -> bool:
        """Whether a start would find nothing to do."""
        return self.steps is not None and self.saved >= self.steps

    def line(self) -> str:
        """For people."""
        if self.steps is None:
            return f"not begun: there is no {CONFIG} in the folder"
        ago = f", {duration(self.age).strip()} ago" if self.age is not None else ""
        state = "finished" if self.finished else "not finished"
        return f"{state}: step {self.recorded} of {self.steps}{ago}; checkpoint of step {self.saved}"


def status_of(run: Path) -> RunStatus:
    """Of a run's folder, which need not exist. Raises UserError where a file in it cannot be understood."""
    config = run / CONFIG
    if not config.is_file():
        return RunStatus(0, 0, None, None)
    problems: list[str] = []
    settings = {setting.key: setting.value for setting in read_recipe(config, problems)}
    if problems:
        raise UserError(*problems)
    folder = Path(str(settings.get("checkpoint.save") or run / "checkpoints"))
    steps = settings.get("run.steps")
    if not isinstance(steps, int):
        raise UserError(f"{config} has no run.steps; it is not the file that a run writes")
    last = _last_line(run / METRICS)
    age = time.time() - last["time"] if "time" in last else None
    return RunStatus(_newest(folder), int(last.get("step", 0)), steps, age)


def _newest(folder: Path) -> int:
    try:
        match = _LATEST.fullmatch((folder / "latest").read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return 0
    return int(match[1]) if match else 0


def _last_line(path: Path) -> dict[str, float]:
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, 2) - 2**16, 0))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and type(found.get("step")) is int:
            return found
    return {}


__all__ = ["RunStatus", "status_of"]
