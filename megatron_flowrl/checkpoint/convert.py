"""`megatron-flowrl convert`: between Hugging Face folders and checkpoints of this program, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_flowrl.checkpoint.export import check_export_folder, export_hugging_face
from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.checkpoint.manifest import read_manifest
from megatron_flowrl.checkpoint.sources import SafetensorsSource, open_source
from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.checkpoint.stream import BUCKET_BYTES, WeightStream
from megatron_flowrl.checkpoint.writer import CheckpointWriter
from megatron_flowrl.config import Config, PrecisionConfig, SharedUserError, UserError, check_config, data_parallel_size
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, freeze
from megatron_flowrl.model.layout import check_layout
from megatron_flowrl.model.transformer_config import DTYPES
from megatron_flowrl.observe.log import logger, progress
from megatron_flowrl.platform import check_platform, current_platform
from megatron_flowrl.platform.distributed import (
    World,
    alike,
    check_agreement,
    process_groups,
    together,
)


def hugging_face_to_megatron(config: Config, world: World, output: Path, *, dtype_given: bool) -> None:
    """Read the Hugging Face folder `config.model.path` into a checkpoint of step 0 in `output`.

    The weights keep the dtype of the files, unless `dtype_given` says that `precision.dtype` was asked for. Raises
    UserError.
    """
    with alike():
        folder = locate_model(config.model.path)
        if folder.checkpoint is not None:
            raise UserError(
                f"{config.model.path!r} is a checkpoint already: hf-to-megatron takes a Hugging Face folder"
            )
        if not dtype_given and config.model.init == "pretrained":
            dtype = SafetensorsSource(folder.hugging_face, read_architecture(folder.hugging_face)).dtype
            config = replace(config, precision=replace(config.precision, dtype=dtype))
        check_config(config)
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(output)))
    with _parallel_model(config, world, lambda: _check_run_folder(output)) as model:
        writer = CheckpointWriter(output, config, folder.hugging_face)
        writer.save(TrainingState(model), step=0, progress={})
        writer.wait()
        if writer.last_saved is None:
            raise SharedUserError(f"output folder {str(output)!r} could not be written; see the error above")


def megatron_to_hugging_face(
    config: Config,
    world: World,
    output: Path,
    *,
    dtype: str | None,
    max_shard_bytes: int,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Write the weights of the checkpoint `config.model.path` as the Hugging Face folder `output`.

    `dtype`: of the files; None for that of the checkpoint. `bucket_bytes`: see WeightStream. Raises UserError.
    """
    with alike():
        folder = locate_model(config.model.path)
        if folder.checkpoint is None:
            raise UserError(
                f"{config.model.path!r} is no checkpoint of this program: it has neither a manifest nor a file 'latest'"
            )
        precision = read_manifest(folder.checkpoint).config.get("precision", {})
        if precision.get("dtype") not in DTYPES:
            raise UserError(f"{folder.checkpoint}: its manifest does not say the dtype of the weights")
        # This checkpoint, whatever is saved meanwhile, and nothing of how its weights were trained or began.
        source = replace(config.model, path=str(folder.checkpoint), init="pretrained")
        config = replace(config, model=source, precision=PrecisionConfig(dtype=precision["dtype"]))
        check_config(config)
    with _parallel_model(config, world, lambda: check_export_folder(output)) as model:
        to = None if dtype is None else getattr(torch, dtype)
        stream = WeightStream(model, dtype=to, bucket_bytes=bucket_bytes)
        with progress(config.logging, world.rank, len(stream.metadata()), "exporting") as advance:
            export_hugging_face(stream, folder.hugging_face, output, max_shard_bytes=max_shard_bytes, on_tensor=advance)
        logger.info("%s written: %.1f MB", output, sum(tensor.nbytes for tensor in stream.metadata()) / 1e6)


def _check_run_folder(output: Path) -> None:
    """A folder that is there may only hold what an earlier attempt that was cut off has left."""
    if not output.is_dir():
        check_export_folder(output)
        return
    others = [path.name for path in sorted(output.iterdir()) if not path.name.startswith(".")]
    if others:
        raise UserError(f"output folder {str(output)!r} is not empty ({others[0]}, ...); give another")


@contextmanager
def _parallel_model(config: Config, world: World, check_output: Callable[[], None]) -> Iterator[ParallelModel]:
    """The model of `config.model.path` with its weights; everything is checked before it is built."""
    with alike():
        data_parallel_size(config.parallel, world.size)
    platform = current_platform(world.local_rank)
    check_platform(config, platform)
    logger.info(platform.describe(config.precision.fp8))
    with process_groups(world, config.parallel, platform, config.seed):
        with together():
            if world.rank == 0:  # the one that makes the folder
                check_output()
            architecture = read_architecture(locate_model(config.model.path).hugging_face)
            check_layout(architecture, config)
            source = open_source(config, architecture)
        check_agreement("the checkpoint that the path leads to", config.model.path)
        check_agreement(f"{config.model.path}/config.json", architecture)
        model = freeze(build_parallel_model(architecture, config, platform))
        parameters = sum(1 for module in model.modules for _ in module.parameters())
        with progress(config.logging, world.rank, parameters, "reading") as advance:
            load_weights(model, source, advance)
        yield model
