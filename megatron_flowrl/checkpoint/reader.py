"""Load checkpoints, under whatever layout, after checking that they are what was written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.checkpoint.manifest import Manifest, problem_with, read_manifest
from megatron_flowrl.checkpoint.state import HEADS, LOG_Z, OPTIMIZER, SCHEDULE, VALUES, TrainingState
from megatron_flowrl.config import Config, SharedUserError, UserError, to_dict
from megatron_flowrl.model.build import ParallelModel, weights_in_place
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import together
from megatron_flowrl.platform.libraries import versions


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on from."""

    step: int
    progress: dict[str, int]


def resume(state: TrainingState, root: Path, config: Config, steps_of: Collection[int] | None = None) -> Resumed | None:
    """Load the newest good checkpoint of a run into `state`; None where there is no checkpoint at all.

    `steps_of`: only checkpoints of these steps. A damaged one is named and passed over. Called by all ranks together.
    Raises UserError, on every rank, where no checkpoint is good, the model is another one, or the optimizer's state is
    missing and `checkpoint.load_optim` does not say that this is meant.
    """
    folder = CheckpointFolder(root)
    steps = [[step for step in folder.steps()[::-1] if steps_of is None or step in steps_of]]
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
        if state.optimizer is not None and not config.checkpoint.load_optim:
            state.optimizer.reload_model_params()  # its fp32 main weights are those of the model before
        _set_aside(folder, steps[0][: steps[0].index(step)], step)
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
    missing = [part for part in state.parts if part not in manifest.parts]
    if not config.checkpoint.load_optim:
        logger.warning("the optimizer starts fresh at step %d: checkpoint.load_optim is false", manifest.step)
        return TrainingState(state.model, schedule=None if SCHEDULE in missing else state.schedule)
    if missing:
        raise SharedUserError(
            f"checkpoint {path} has no {' and no '.join(_NAMES[part] for part in missing)}, only "
            f"{', '.join(manifest.parts)}: going on from it would begin with a fresh one; set "
            "checkpoint.load_optim=false if that is meant"
        )
    saved = manifest.config.get("precision", {}).get("dtype")
    if state.optimizer is not None and saved != config.precision.dtype:
        raise SharedUserError(
            f"checkpoint {path} was trained with precision.dtype = {saved}, not {config.precision.dtype}: its main "
            f"weights do not carry over; set precision.dtype={saved}, or checkpoint.load_optim=false to begin with a "
            "fresh optimizer"
        )
    return state


_NAMES = {
    OPTIMIZER: "optimizer state",
    SCHEDULE: "place in the learning rate's schedule",
    LOG_Z: "log Z head",
    VALUES: "value head",
}


def _set_aside(folder: CheckpointFolder, damaged: list[int], step: int) -> None:
    """What was passed over is neither to be tried again nor to count as one of those that are kept."""
    if not damaged:
        return
    logger.warning("going on from step %d: %d newer checkpoints are damaged", step, len(damaged))
    if dist.get_rank() == 0:
        try:
            for other in damaged:
                logger.warning("the damaged checkpoint is now %s", folder.set_aside(other))
            folder.point_to(step)
        except OSError as error:
            logger.warning("a damaged checkpoint could not be moved aside: %s", error)
    dist.barrier()


def _load(state: TrainingState, manifest: Manifest, path: Path) -> None:
    with together():
        manifest.check_architecture(state.model.architecture, path)
        if VALUES in manifest.parts and VALUES not in state.parts:
            raise UserError(f"checkpoint {path} is a critic's, which has no output layer: give the policy's")
    with weights_in_place(state.model.chunks):
        without = tuple(prefix for part, prefix in HEADS.items() if part not in manifest.parts)
        sharded = state.sharded_state_dict(without=without)
        # Megatron-Core 0.19 would quantise FP8 weights while it reads them, and the optimizer begin from rounded ones.
        # (Where there is an optimizer and checkpoint.load_optim is false, it does: Megatron takes them from the model.)
        force_all_tensors_to_non_fp8(sharded)
        trouble: Exception | None = None
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(path))
        except Exception as error:  # torch and Megatron raise a dozen kinds
            trouble = error
        with together():
            if trouble is not None:
                raise UserError(_cannot_load(path, trouble, manifest)) from trouble
        state.restore(loaded)


def _cannot_load(path: Path, error: Exception, manifest: Manifest) -> str:
    saved, running = manifest.versions, versions()
    differing = [
        f"{name} {saved[name]} then, {running.get(name)} now" for name in saved if saved[name] != running.get(name)
    ]
    written = f" (written with other versions: {'; '.join(differing)})" if differing else ""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return f"checkpoint {path} cannot be loaded, though its files are what was written: {reason}{written}"


def _tell_changes(manifest: Manifest, config: Config) -> None:
    before, now = _flat(manifest.config), _flat(to_dict(config))
    changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in now if before.get(key) != now.get(key)]
    logger.info("going on from step %d; settings changed since: %s", manifest.step, ", ".join(changed) or "none")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
