"""What answers Megatron's CUDA calls on a CPU: it can be taken away again without a trace, and fools nobody else."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_flowrl.platform import cuda_stand_in

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")

MODULES = (
    *cuda_stand_in._MODULES_NAMING_CUDA,
    "megatron.core.jit",
    "megatron.core.tensor_parallel.random",
    "megatron.core.optimizer",
    "megatron.core.optimizer.optimizer",
)


def snapshot() -> dict[Any, dict[str, Any]]:
    """Every attribute of every object that anything is replaced in."""
    modules = [importlib.import_module(name) for name in MODULES]
    classes = [torch.Tensor, torch.nn.Module, Float16OptimizerWithFloat16Params, DistributedOptimizer]
    return {owner: dict(vars(owner)) for owner in (torch, torch.cuda, *modules, *classes)}


def replaced(before: dict[Any, dict[str, Any]]) -> set[str]:
    """`owner.name` of all that is not the very object it was, or is new, or gone."""
    found, nothing = set(), object()
    for owner, after in snapshot().items():
        for name in before[owner].keys() | after.keys():
            if before[owner].get(name, nothing) is not after.get(name, nothing):
                found.add(f"{owner.__name__}.{name}")
    return found


@pytest.fixture
def originals() -> Iterator[dict[Any, dict[str, Any]]]:
    """The attributes before; whatever a test has installed is taken away after it."""
    assert not cuda_stand_in.is_installed()
    yield snapshot()
    cuda_stand_in.uninstall()


@pytest.fixture
def installed(originals: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    cuda_stand_in.install()
    return originals


def test_uninstalling_restores_every_attribute(originals: dict[Any, dict[str, Any]]) -> None:
    cuda_stand_in.install()
    assert cuda_stand_in.is_installed()
    names = replaced(originals)
    assert {f"torch.cuda.{name}" for name in cuda_stand_in._TORCH_CUDA} <= names
    assert {f"{name}.torch" for name in cuda_stand_in._MODULES_NAMING_CUDA} <= names
    assert {"Tensor.cuda", "Module.cuda", "DistributedOptimizer.__init__"} <= names
    cuda_stand_in.uninstall()
    assert not cuda_stand_in.is_installed()
    assert replaced(originals) == set()


def test_only_what_is_listed_is_replaced(installed: dict[Any, dict[str, Any]]) -> None:
    owners = {name.rpartition(".")[0] for name in replaced(installed)}
    assert "torch" not in owners
    assert {name for name in replaced(installed) if name.startswith(("Tensor", "Module"))} == {
        "Tensor.cuda",
        "Module.cuda",
    }


def test_adam_is_torchs_whatever_else_is_installed(
    originals: dict[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers = importlib.import_module("megatron.core.optimizer")
    monkeypatch.setattr(optimizers, "Adam", object)  # as where Transformer Engine can be imported
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    cuda_stand_in.install()
    assert optimizers.Adam is torch.optim.AdamW and optimizers.USING_PYTORCH_OPTIMIZER is True
    cuda_stand_in.uninstall()
    assert optimizers.Adam is object and optimizers.USING_PYTORCH_OPTIMIZER is False


def test_installing_twice_is_installing_once(originals: dict[Any, dict[str, Any]]) -> None:
    cuda_stand_in.install()
    first = snapshot()
    cuda_stand_in.install()
    assert replaced(first) == set()
    cuda_stand_in.uninstall()
    assert replaced(originals) == set()


def test_uninstalling_what_is_not_installed(originals: dict[Any, dict[str, Any]]) -> None:
    cuda_stand_in.uninstall()
    assert replaced(originals) == set()


def test_it_refuses_to_run_beside_a_gpu(originals: dict[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(RuntimeError, match="a GPU is visible"):
            cuda_stand_in.install()
    assert not cuda_stand_in.is_installed()
    assert replaced(originals) == set()


def test_an_installation_that_fails_leaves_nothing(
    originals: dict[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cuda_stand_in, "_MODULES_NAMING_CUDA", ("megatron.core.no_such_module",))
        with pytest.raises(ImportError):
            cuda_stand_in.install()
    assert not cuda_stand_in.is_installed()
    assert replaced(originals) == set()


def test_nothing_is_left_where_megatron_was_imported_meanwhile() -> None:
    """As in a program: Megatron's modules take what they find in torch.cuda. In a process of its own."""
    program = """
import sys, torch
from megatron_flowrl.platform import cuda_stand_in
assert not any(name.startswith("megatron.") for name in sys.modules)
cuda_stand_in.install()
import megatron_flowrl.training.passes, megatron_flowrl.training.optimizer
cuda_stand_in.uninstall()
ours = {id(value) for value in cuda_stand_in._TORCH_CUDA.values()}
for name, module in sorted(sys.modules.items()):
    if name == "torch.cuda" or name.startswith("megatron."):
        for key, value in vars(module).items():
            assert id(value) not in ours and not isinstance(value, cuda_stand_in._TorchReadingCudaAsCpu), (name, key)
print("clean")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.endswith("clean\n"), done.stderr


def test_there_is_still_no_gpu_for_anybody_else(installed: object) -> None:
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    for factory in (torch.zeros, torch.ones, torch.empty):
        with pytest.raises((AssertionError, RuntimeError)):
            factory(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.tensor([1.0], device="cuda:0")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).to("cuda")


@pytest.mark.parametrize("module", cuda_stand_in._MODULES_NAMING_CUDA)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "cpu", None])
def test_megatrons_modules_make_tensors_on_the_cpu(installed: object, module: str, device: Any) -> None:
    view = vars(importlib.import_module(module))["torch"]
    made = [
        view.zeros(2, device=device),
        view.ones(2, device=device),
        view.empty(2, device=device),
        view.full((2,), 3.0, device=device),
        view.tensor([1.0, 2.0], device=device),
        view.arange(2, device=device),
        view.zeros_like(torch.ones(2), device=device),
        view.empty_like(torch.ones(2), device=device),
    ]
    assert all(tensor.device == torch.device("cpu") and tensor.shape == (2,) for tensor in made)
    assert view.Tensor is torch.Tensor and view.distributed is torch.distributed  # the rest is torch's own


def test_tensors_and_modules_are_where_they_have_to_be(installed: object) -> None:
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and tensor.cuda(0, non_blocking=True) is tensor
    assert module.cuda() is module
    assert torch.cuda.current_device() == torch.device("cpu")


def test_streams_and_events_order_nothing(installed: object) -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream), stream:
        event.record(stream)
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(stream.record_event())
    torch.cuda.default_stream().synchronize()
    torch.cuda.synchronize()
    event.synchronize()
    assert event.query() and stream.query()
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == torch.cuda.memory_reserved() == 0


def test_the_generator_is_the_cpus(installed: object) -> None:
    from megatron.core.tensor_parallel import random

    with torch.random.fork_rng(devices=[]):
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        random._set_cuda_rng_state(state)
        assert torch.equal(random._get_cuda_rng_state(), state)
        assert torch.equal(torch.rand(3), first)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), first)


def test_type_names_are_cudas_only_inside_megatrons_optimizer(installed: object) -> None:
    """Also after an error in there; a conversion by `type` is what it was."""
    seen, original = [], torch.Tensor.type

    def inside(tensor: torch.Tensor) -> None:
        seen.append((tensor.type(), tensor.type(torch.float64).dtype))
        raise ValueError

    with pytest.raises(ValueError):
        cuda_stand_in._with_cuda_type_names(inside)(torch.ones(1))
    assert seen == [("torch.cuda.FloatTensor", torch.float64)]
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.Tensor.type is original
