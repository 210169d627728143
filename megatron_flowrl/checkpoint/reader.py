"""Load checkpoints, under whatever layout, after checking that they are what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.checkpoint.manifest import Manifest, problem_with, read_manifest
from megatron_flowrl.checkpoint.state import LOG_Z, OPTIMIZER, SCHEDULE, TrainingState
from megatron_flowrl.config import Config, SharedUserError, UserError, to_dict
from megatron_flowrl.model.build import ParallelModel, weights_in_place
from megatron_flowrl.model.gpt import OWN_HEADS
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import together
from megatron_flowrl.platform.libraries import versions


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on from."""

    step: int
    progress: dict[str, int]


def resume(state: TrainingState, root: Path, config: Config) -> Resumed | None:
    """Load the newest good checkpoint of a run into `state`; None where there is no checkpoint at all.

    A damaged one is named and passed over. Called by all ranks together. Raises UserError, on every rank, where no
    checkpoint is good, the model is another one, or the optimizer's state is missing and
    `checkpoint.load_optim` does not say that this is meant.
    """
    folder = CheckpointFolder(root)
    steps = [folder.steps()[::-1]]
    dist.broadcast_object_list(steps, src=0)
    damages: list[str] = []
    for step in steps[0]:
        path = folder.path_of(step)
        try:
            manifest = verified_manifest(path, checksums=config.checkpoint.verify_checksums)
        except SharedUserError as error:
            damages.extend(error.problems)
            logger.warning("checkpoint %s is passed over: %s", path, error)
            continue
        _load(_wanted(state, manifest, path, config), manifest, path)
        if damages:
            logger.warning("going on from step %d: %d newer checkpoints are damaged", step, steps[0].index(step))
        _tell_changes(manifest, config)
        return Resumed(manifest.step, manifest.progress)
    if damages:
        raise SharedUserError(
            *damages,
            f"no checkpoint in {root} can be used: restore one, or give another checkpoint.save to begin anew",
        )
    return None


def load_model(model: ParallelModel, path: Path, *, checksums: bool = True) -> Manifest:
    """Load only the weights of the checkpoint `path`; called by all ranks together. Raises UserError on every rank."""
    manifest = verified_manifest(path, checksums=checksums)
    _load(TrainingState(model), manifest, path)
    return manifest


def verified_manifest(path: Path, *, checksums: bool) -> Manifest:
    """Read the manifest and check every file it lists, the ranks sharing the work. Raises UserError on every rank."""
    with together():
        manifest = read_manifest(path)
    with together():
        records = sorted(manifest.files.items())[dist.get_rank() :: dist.get_world_size()]
        problems = [problem_with(path, name, record, checksum=checksums) for name, record in records]
        if any(problems):
            raise UserError(*filter(None, problems))
    return manifest


def _wanted(state: TrainingState, manifest: Manifest, path: Path, config: Config) -> TrainingState:
    """What of the state is to be loaded."""
    if state.optimizer is None:
        return state
    if not config.checkpoint.load_optim:
        logger.warning("the optimizer starts fresh at step %d: checkpoint.load_optim is false", manifest.step)
        return TrainingState(state.model, schedule=state.schedule if SCHEDULE in manifest.parts else None)
    if OPTIMIZER not in manifest.parts:
        raise SharedUserError(
            f"checkpoint {path} has no optimizer state, only {', '.join(manifest.parts)}: going on from it would begin "
            "with a fresh optimizer; set checkpoint.load_optim=false if that is meant"
        )
    if state.model.log_z and LOG_Z not in manifest.parts:
        raise SharedUserError(
            f"checkpoint {path} has no log Z head, which this run trains: going on would begin with a fresh one; set "
            "checkpoint.load_optim=false if that is meant"
        )
    return state


def _load(state: TrainingState, manifest: Manifest, path: Path) -> None:
    with together():
        manifest.check_architecture(state.model.architecture, path)
    with weights_in_place(state.model.chunks):
        without = OWN_HEADS if LOG_Z not in manifest.parts else ()
        sharded = state.sharded_state_dict(without=without)
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(path))
        except Exception as error:
            saved, running = manifest.versions, versions()
            differing = [
                f"{name} {saved[name]} then, {running.get(name)} now"
                for name in saved
                if saved[name] != running.get(name)
            ]
            raise UserError(
                f"checkpoint {path} is whole but cannot be loaded: {' '.join(str(error).split())[:500]}"
                + (f" (written with other versions: {'; '.join(differing)})" if differing else "")
            ) from error
        state.restore(loaded)


def _tell_changes(manifest: Manifest, config: Config) -> None:
    before, now = _flat(manifest.config), _flat(to_dict(config))
    changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in now if before.get(key) != now.get(key)]
    logger.info("going on from step %d; settings changed since: %s", manifest.step, ", ".join(changed) or "none")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
