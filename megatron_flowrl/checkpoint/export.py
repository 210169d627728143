"""Write a parallel model as a Hugging Face folder: safetensors shards, index, configuration, tokenizer.

The cut into files depends on the tensors alone, so that every layout writes the same files, byte for byte. Replicas
share the files out, and each file is written by one rank while it is streamed: no rank holds a file, let alone the
model.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_flowrl.checkpoint.companions import read_companions, write_companions
from megatron_flowrl.checkpoint.safetensors_writer import SafetensorsWriter
from megatron_flowrl.checkpoint.stream import TensorInfo, WeightStream
from megatron_flowrl.config import UserError
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.atomic import partial_path, partials_in, publish, remove
from megatron_flowrl.platform.distributed import together

MAX_SHARD_BYTES = 5 * 10**9  # as transformers
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file and what goes into it, in order."""

    name: str
    tensors: tuple[TensorInfo, ...]


def plan_files(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> list[WeightFile]:
    """Cut the tensors, in order, into files of at most `max_shard_bytes`; a larger tensor has a file of its own."""
    groups: list[list[TensorInfo]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > max_shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return [WeightFile(SINGLE_FILE, tuple(groups[0]))]
    return [
        WeightFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def check_export_folder(folder: Path) -> None:
    """Refuse an output folder that is there already, or cannot be made. Raises UserError."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f"output folder {str(folder)!r} exists already; give another, or remove it first")
    parent = folder.resolve().parent
    if not parent.is_dir():
        raise UserError(f"output folder {str(folder)!r}: {str(parent)!r} does not exist; create it")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output folder {str(folder)!r}: {str(parent)!r} cannot be written to")


def export_hugging_face(
    stream: WeightStream,
    companions: Path,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[], object] = lambda: None,
) -> None:
    """Write `folder`, which appears whole or not at all. All ranks call this together, on one shared file system.

    `companions` is a folder with config.json and tokenizer; `on_tensor` is called after each tensor of this replica.
    Raises UserError, on every rank, where the disk does not take it.
    """
    partial = partial_path(folder.resolve(), _shared_token())
    files = plan_files(stream.metadata(), max_shard_bytes)
    try:
        with together(), _disk(folder):
            if dist.get_rank() == 0:
                _name_leftovers(folder.resolve())
                contents = read_companions(companions)
                partial.mkdir()
                write_companions(contents, partial, stream.dtype)
                _write_index(partial, files)
        trouble = _write_weights(stream, partial, files, on_tensor)
        with together(), _disk(folder):
            if trouble is not None:
                raise trouble
        with together(), _disk(folder):
            if dist.get_rank() == 0:
                publish(partial, folder.resolve())
    finally:
        if dist.get_rank() == 0 and partial.exists():
            with suppress(OSError):  # what is being raised says more
                remove(partial)


def _write_weights(
    stream: WeightStream, partial: Path, files: Sequence[WeightFile], on_tensor: Callable[[], object]
) -> OSError | None:
    """Write this rank's share of the files, taking part in all of its replica's; returns the first trouble."""
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank() + ranks * parallel_state.get_pipeline_model_parallel_rank()
    ranks *= parallel_state.get_pipeline_model_parallel_world_size()
    share = list(files[replica::replicas])
    tensors = stream.tensors({tensor.name for file in share for tensor in file.tensors})
    trouble: OSError | None = None
    for number, file in enumerate(share):
        sink = _Sink(partial / file.name, file.tensors) if number % ranks == rank else None
        for name, tensor in islice(tensors, len(file.tensors)):
            if sink is not None:
                sink.write(name, tensor)
            on_tensor()
        if sink is not None:
            sink.close()
            trouble = trouble or sink.trouble
    if next(tensors, None) is not None:
        raise RuntimeError("the stream yields more than was asked for")
    return trouble


class _Sink:
    """A file whose trouble waits: the rank has to go on receiving, as others are in collectives with it."""

    def __init__(self, path: Path, tensors: Sequence[TensorInfo]) -> None:
        self.trouble: OSError | None = None
        self._stack = ExitStack()
        self._writer: SafetensorsWriter | None = None
        with self._noting():
            self._writer = self._stack.enter_context(SafetensorsWriter(path, tensors))

    def write(self, name: str, tensor: Tensor) -> None:
        if self._writer is not None and self.trouble is None:
            with self._noting():
                self._writer.write(name, tensor)

    def close(self) -> None:
        with self._noting():
            error = self.trouble
            self._stack.__exit__(*((type(error), error, error.__traceback__) if error else (None, None, None)))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.trouble = self.trouble or error


def _write_index(partial: Path, files: Sequence[WeightFile]) -> None:
    if len(files) == 1:
        return
    tensors = [(tensor, file.name) for file in files for tensor in file.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(torch.Size(tensor.shape).numel() for tensor, _ in tensors),
            "total_size": sum(tensor.nbytes for tensor, _ in tensors),
        },
        "weight_map": {tensor.name: file for tensor, file in tensors},
    }
    (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _name_leftovers(folder: Path) -> None:
    for path in partials_in(folder.parent):
        if path.name.startswith(f".{folder.name}."):
            logger.warning("%s was left by an export that was cut off; remove it", path)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output folder {str(folder)!r} cannot be written: {error.strerror or error}") from error


def _shared_token() -> str:
    token = [secrets.token_hex(4)]
    dist.broadcast_object_list(token, src=0)
    return token[0]
