"""Where weights come from: a Hugging Face folder's safetensors, or a seed. By slice, never the whole model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.checkpoint.manifest import read_manifest
from megatron_flowrl.checkpoint.mapping import hugging_face_shapes
from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.config import Config, UserError
from megatron_flowrl.model.architecture import Architecture

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {"I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn"}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class SliceSource(Protocol):
    """Anything that has the tensors of a Hugging Face checkpoint by name."""

    def read(self, piece: Slice) -> Tensor:
        """The slice, on the CPU, in the source's dtype."""
        ...


class SafetensorsSource:
    """The weights of a Hugging Face folder: one `model.safetensors`, or shards with an index.

    Headers are checked against the architecture when it is made. Raises UserError naming file and tensor for what is
    missing, damaged or of another shape.
    """

    def __init__(self, folder: str | os.PathLike[str], architecture: Architecture) -> None:
        self._folder = Path(folder)
        file_of = self._locate()
        self._files = {name: self._open(name) for name in sorted(set(file_of.values()))}
        self._file_of = file_of
        self._names = tuple(hugging_face_shapes(architecture))
        self._check(architecture)

    def read(self, piece: Slice) -> Tensor:
        """Only the bytes of the slice are read."""
        tensor = self._files[self._file_of[piece.name]].get_slice(piece.name)
        return tensor[piece.start : piece.stop] if piece.dim == 0 else tensor[:, piece.start : piece.stop]

    @property
    def dtype(self) -> Literal["bfloat16", "float32"]:
        """The format that holds every tensor as it is: bfloat16 where all are, else float32 (which rounds float64)."""
        return "bfloat16" if {self.dtype_of(name) for name in self._names} == {torch.bfloat16} else "float32"

    def dtype_of(self, name: str) -> torch.dtype:
        """Of one tensor in the files."""
        return _DTYPES[self._files[self._file_of[name]].get_slice(name).get_dtype()]

    def _locate(self) -> dict[str, str]:
        index, single = self._folder / _INDEX, self._folder / _SINGLE
        if index.is_file():
            try:
                file_of = dict(json.loads(index.read_text())["weight_map"])
                if not all(isinstance(file, str) for file in file_of.values()):
                    raise ValueError("weight_map must give the name of a file for every tensor")
                return file_of
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index} is not a safetensors index: {error!r}") from error
        if single.is_file():
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        raise UserError(
            f"{self._folder} has neither {_SINGLE} nor {_INDEX}: convert the weights to safetensors, "
            "or set model.init=random to start from nothing"
        )

    def _open(self, name: str) -> safe_open:
        path = self._folder / name
        if not path.is_file():
            raise UserError(f"{path} does not exist, but {_INDEX} names it: the download is incomplete")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}): fetch it again") from error

    def _check(self, architecture: Architecture) -> None:
        problems = []
        for name, shape in hugging_face_shapes(architecture).items():
            if name not in self._file_of:
                problems.append(f"{name} is missing")
                continue
            file = self._files[self._file_of[name]]
            if name not in file.keys():  # noqa: SIM118 - safe_open is no mapping
                problems.append(f"{name} is not in {self._file_of[name]}, where the index places it")
                continue
            found, dtype = tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()
            where = f"{name} in {self._file_of[name]}"
            if found != shape:
                problems.append(f"{where} has shape {found}, config.json says {shape}")
            elif dtype not in _DTYPES:
                problems.append(f"{where} is {_NAMES.get(dtype, dtype)}: quantised weights are not supported")
        expected = hugging_face_shapes(architecture).keys()
        for name in sorted(self._file_of.keys() - expected):
            # A tied head may be stored beside the embedding; older checkpoints store what RoPE computes.
            if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
                problems.append(f"{name} is in the files, but not in the model that config.json describes")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise UserError(f"weights in {self._folder} do not fit: {'; '.join(problems[:5])}{more}")


class RandomSource:
    """Weights from nothing: each full tensor from a generator seeded by (seed, its name), the same for any layout.

    Matrices are normal with the architecture's `initializer_range`, norms are 1, biases 0: transformers' own start.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self._shapes = hugging_face_shapes(architecture)
        self._deviation = architecture.initializer_range
        self._seed = seed
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, piece: Slice) -> Tensor:
        """fp32."""
        return self._full(piece.name).narrow(piece.dim, piece.start, piece.stop - piece.start)

    def _full(self, name: str) -> Tensor:
        if self._last[0] != name:
            self._last = (name, self._draw(name))
        return self._last[1]

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).normal_(0.0, self._deviation, generator=generator)


@dataclass(frozen=True)
class CheckpointSource:
    """The weights of a checkpoint of this program, which Megatron reads; its architecture has been compared."""

    path: Path
    checksums: bool


WeightSource = SliceSource | CheckpointSource


def open_source(config: Config, architecture: Architecture) -> WeightSource:
    """The weights `config.model` asks for. Raises UserError where they are missing, damaged or of another shape."""
    if config.model.init == "random":
        return RandomSource(architecture, config.seed)
    folder = locate_model(config.model.path)
    if folder.checkpoint is None:
        return SafetensorsSource(folder.hugging_face, architecture)
    read_manifest(folder.checkpoint).check_architecture(architecture, folder.checkpoint)
    return CheckpointSource(folder.checkpoint, config.checkpoint.verify_checksums)
