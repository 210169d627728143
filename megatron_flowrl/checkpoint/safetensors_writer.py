"""Write a safetensors file tensor by tensor: the library's own writer wants all of them in memory at once.

Format: 8 bytes little-endian length of the header, the header as JSON (name -> dtype, shape, data_offsets relative to
the end of the header), then the tensors' bytes in row-major order; https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_flowrl.checkpoint.stream import TensorInfo

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


class SafetensorsWriter:
    """A file of `tensors`, written in that order. A context manager; leaving it by an error leaves no whole file."""

    def __init__(self, path: Path, tensors: Sequence[TensorInfo]) -> None:
        self._waiting = list(reversed(tensors))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            end = position + tensor.nbytes
            header[tensor.name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(len(encoded).to_bytes(8, "little"))
        self._file.write(encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; raises ValueError where it is not the one that was announced."""
        expected = self._waiting.pop()
        if (name, tuple(tensor.shape), tensor.dtype) != (expected.name, expected.shape, expected.dtype):
            raise ValueError(f"expected {expected}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        on_host = tensor.detach().to("cpu").contiguous()
        self._file.write(on_host.view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._waiting:
                raise ValueError(f"{len(self._waiting)} tensors were announced but not written")
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
