"""The folder of a run's checkpoints: one folder a step; `latest` and `best`, files that name the newest whole one and
the one that an evaluation liked best."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from megatron_flowrl.checkpoint.manifest import MANIFEST_FILE
from megatron_flowrl.config import UserError
from megatron_flowrl.platform.atomic import final_path, partial_path, partials_in, publish, remove, write_file

LATEST_FILE, BEST_FILE = "latest", "best"
_STEP = re.compile(r"step_(\d{8,})")
_REPLACED = "replaced"


class CheckpointFolder:
    """`root` need not exist yet. Only one rank may change it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.root / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first. One that is newer than `latest` is whole too: the run was cut
        off between giving it its name and pointing to it."""
        if not self.root.is_dir():
            return []
        matches = [_STEP.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        """The step that `latest` names; None without the file. Raises UserError where it cannot be understood."""
        path = self.root / LATEST_FILE
        try:
            content = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        match = _STEP.fullmatch(content)
        if match is None:
            raise UserError(f"{path} holds {content[:80]!r}; it should hold the name of a checkpoint, as step_00000010")
        return int(match[1])

    def commit(self, partial: Path, step: int) -> None:
        """Everything is written: put the checkpoint in its place, then name it in `latest`."""
        final, replaced = self.path_of(step), partial_path(self.path_of(step), _REPLACED)
        if final.exists():
            os.rename(final, replaced)
        publish(partial, final)
        self.point_to(step)
        if replaced.exists():
            remove(replaced)

    def point_to(self, step: int) -> None:
        """Name a step in `latest`."""
        write_file(self.root / LATEST_FILE, self.path_of(step).name + "\n")

    def best(self) -> tuple[int, float] | None:
        """The step that `best` names, and its reward; None without the file, or where it cannot be understood."""
        try:
            record = json.loads((self.root / BEST_FILE).read_text(encoding="utf-8"))
            match = _STEP.fullmatch(record["checkpoint"])
            return (int(match[1]), float(record["reward"])) if match else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def point_to_best(self, step: int, reward: float) -> None:
        """Name a step in `best`, which keeps it from being deleted."""
        write_file(self.root / BEST_FILE, json.dumps({"checkpoint": self.path_of(step).name, "reward": reward}) + "\n")

    def set_aside(self, step: int) -> Path:
        """Give a damaged checkpoint a name under which it is neither tried again nor counted."""
        aside = self.root / f"damaged_{self.path_of(step).name}"
        if aside.exists():
            remove(aside)
        os.rename(self.path_of(step), aside)
        return aside

    def prune(self, keep: int) -> list[int]:
        """Delete all but the newest `keep`, never those that `latest` and `best` name; returns the deleted steps."""
        best = self.best()
        kept = (self.latest(), best[0] if best is not None else None)
        doomed = [step for step in self.steps()[:-keep] if step not in kept]
        for step in doomed:
            remove(self.path_of(step))
        return doomed

    def sweep(self) -> None:
        """Delete what attempts that were cut off have left behind, and put back what one was about to replace."""
        for partial in partials_in(self.root):
            if partial.name.endswith(_REPLACED) and not final_path(partial).exists():
                os.rename(partial, final_path(partial))
        for partial in partials_in(self.root):
            remove(partial)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` means: itself, or the latest in a run's folder; None where it is neither.

    Raises UserError for a run's folder whose `latest` leads nowhere.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    if (path / "config.json").is_file():  # a Hugging Face folder, whatever a trainer has left in it
        return None
    folder = CheckpointFolder(path)
    latest = folder.latest()
    if latest is None:
        if folder.steps():
            raise UserError(f"{path} holds checkpoints but no file {LATEST_FILE!r}: give one of its folders")
        return None
    if not folder.path_of(latest).is_dir():
        raise UserError(
            f"{path / LATEST_FILE} names {folder.path_of(latest).name}, which is not there; "
            f"there are {', '.join(folder.path_of(step).name for step in folder.steps()) or 'no checkpoints'}"
        )
    return folder.path_of(latest)
