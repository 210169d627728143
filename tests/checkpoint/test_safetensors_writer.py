"""Files written tensor by tensor are what the safetensors library writes and reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_flowrl.checkpoint.export import MAX_SHARD_BYTES, plan_files
from megatron_flowrl.checkpoint.safetensors_writer import SafetensorsWriter
from megatron_flowrl.checkpoint.stream import TensorInfo


def info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "ü": torch.randn(2, 2, 2), "empty": torch.randn(0, 4)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["cut"] = torch.randn(6, 6).to(dtype)[::2, 1:3]
    with SafetensorsWriter(tmp_path / "file", [info(*item) for item in tensors.items()]) as writer:
        for item in tensors.items():
            writer.write(*item)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == dtype for name in tensors)


def test_another_tensor_than_announced_is_refused(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    for wrong in (("b", tensor), ("a", torch.zeros(3)), ("a", tensor.half())):
        with (
            pytest.raises(ValueError, match="expected TensorInfo"),
            SafetensorsWriter(tmp_path / "file", [info("a", tensor)]) as writer,
        ):
            writer.write(*wrong)


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="1 tensors were announced but not written"),
        SafetensorsWriter(tmp_path / "file", [info("a", torch.zeros(2))]),
    ):
        pass


def test_files_are_cut_in_order_and_below_the_limit() -> None:
    tensors = [TensorInfo(f"t{i}", (size,), torch.float32) for i, size in enumerate((10, 10, 5, 100, 1, 1))]
    files = plan_files(tensors, 100)
    assert [[t.name for t in file.tensors] for file in files] == [["t0", "t1", "t2"], ["t3"], ["t4", "t5"]]
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (single,) = plan_files(tensors, MAX_SHARD_BYTES)
    assert single.name == "model.safetensors" and list(single.tensors) == tensors
