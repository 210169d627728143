"""`megatron-flowrl convert inspect`: what a checkpoint or a Hugging Face folder holds, and whether it is whole.

One process without a process group, reading headers and, for checksums, bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.checkpoint.manifest import Manifest, problem_with, read_manifest
from megatron_flowrl.checkpoint.mapping import hugging_face_shapes
from megatron_flowrl.checkpoint.sources import SafetensorsSource
from megatron_flowrl.checkpoint.stream import TensorInfo
from megatron_flowrl.config import Config, UserError
from megatron_flowrl.model.architecture import Architecture, read_architecture
from megatron_flowrl.observe.log import progress


def inspect(path: Path, config: Config) -> Iterator[str]:
    """Lines of the report. Raises UserError, after the lines, where a file is damaged."""
    folder = locate_model(path)
    if folder.checkpoint is None:
        yield from _hugging_face(path)
        return
    manifest = read_manifest(folder.checkpoint)
    yield from _about(folder.checkpoint, manifest)
    problems = []
    with progress(config.logging, 0, len(manifest.files), "checksums") as advance:
        for name, record in sorted(manifest.files.items()):
            problems.append(problem_with(folder.checkpoint, name, record))
            advance()
    if any(problems):
        raise UserError(*filter(None, problems))
    yield from _tensors(_stored_tensors(folder.checkpoint))
    size = sum(record.size for record in manifest.files.values())
    yield f"checksums  {len(manifest.files)} files, {size / 1e6:,.1f} MB: all as written"


def _about(checkpoint: Path, manifest: Manifest) -> Iterator[str]:
    sizes = ", ".join(f"{key.removesuffix('_size')} {size}" for key, size in manifest.layout.items())
    yield f"checkpoint {checkpoint}"
    yield f"step       {manifest.step}" + "".join(f", {key} {value}" for key, value in manifest.progress.items())
    yield f"holds      {', '.join(manifest.parts)}"
    yield f"saved by   {sizes}"
    yield f"versions   {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}"
    yield _family(manifest.architecture)


def _family(architecture: Mapping[str, object]) -> str:
    keys = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    tied = "tied" if architecture.get("tie_word_embeddings") else "untied"
    sizes = ", ".join(f"{key} {architecture.get(key)}" for key in keys)
    return f"family     {architecture.get('family')}, {tied} embeddings: {sizes}"


def _stored_tensors(checkpoint: Path) -> list[TensorInfo]:
    metadata = FileSystemReader(checkpoint).read_metadata()
    return [
        TensorInfo(name, tuple(stored.size), stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    ]


def _hugging_face(path: Path) -> Iterator[str]:
    architecture: Architecture = read_architecture(path)
    source = SafetensorsSource(path, architecture)
    yield f"folder     {path} (Hugging Face)"
    yield _family(asdict(architecture))
    yield from _tensors(
        TensorInfo(name, shape, source.dtype_of(name)) for name, shape in hugging_face_shapes(architecture).items()
    )
    yield "checksums  none in this format; every tensor is there, with the shape that config.json says"


def _tensors(tensors: Iterable[TensorInfo]) -> Iterator[str]:
    listed = list(tensors)
    width = max((len(tensor.name) for tensor in listed), default=0)
    for tensor in listed:
        dtype, shape = str(tensor.dtype).removeprefix("torch."), " x ".join(map(str, tensor.shape))
        yield f"  {tensor.name:<{width}}  {dtype:<8}  {shape:<18}  {tensor.nbytes / 1e6:>12,.3f} MB"
    by_dtype: dict[torch.dtype, int] = {}
    for tensor in listed:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + math.prod(tensor.shape)
    counts = ", ".join(f"{count:,} {str(dtype).removeprefix('torch.')}" for dtype, count in by_dtype.items())
    yield f"tensors    {len(listed)}: {counts}; {sum(tensor.nbytes for tensor in listed) / 1e6:,.1f} MB"
