"""Which libraries count as present, which Megatron-Core will do, and what a machine cannot honour."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_flowrl.config import Config, PrecisionConfig, RecomputeConfig, UserError
from megatron_flowrl.platform import Libraries, Platform, check_platform, current_platform
from megatron_flowrl.platform.libraries import check_megatron_version, find_libraries

LIBRARIES = Libraries("2.13.0", "0.16.1", None, None, fused_weight_gradient=False, fused_adam=None)
CPU = Platform(torch.device("cpu"), "gloo", LIBRARIES)
GPU = Platform(
    torch.device("cuda", 0),
    "nccl",
    replace(LIBRARIES, transformer_engine="2.8", fused_weight_gradient=True, fused_adam="transformer_engine"),
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a package with the given files on sys.path, for the test only."""
    names = ("apex", "transformer_engine", "fused_weight_gradient_mlp_cuda")
    if any(name in sys.modules for name in names):
        pytest.skip("the real library is loaded")

    def write(name: str, **files: str) -> None:
        for file, content in {"__init__": "", **files}.items():
            path = tmp_path / name / f"{file}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]


@pytest.mark.parametrize("version", ["0.16.0", "0.16.1", "0.16.1+local", "0.19.2", "0.19.0rc1"])
def test_a_known_version_is_silent(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.17.0", "0.18.2", "0.20.0", "1.0", "1.16.1"])
def test_an_unknown_version_is_warned_of_by_name(version: str) -> None:
    with pytest.warns(UserWarning, match=f"megatron-core {version} is not a version .* tested with .0.16, 0.19."):
        check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.15.3", "0.9.0", "0.1", "0", "unknown", ""])
def test_a_version_too_old_is_refused(version: str) -> None:
    with pytest.raises(UserError, match=f"megatron-core {version} is not supported: install one of 0.16, 0.19"):
        check_megatron_version(version)


def test_a_missing_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UserError, match="megatron-core is not installed: pip install"):
        find_libraries()


def test_what_is_installed_here() -> None:
    libraries = find_libraries()
    assert libraries.torch == torch.__version__
    assert libraries.megatron_core == metadata.version("megatron-core")


def test_an_unrelated_apex_counts_as_absent(package: Callable[..., None]) -> None:
    """The one of the Python package index has neither optimizers nor multi-tensor kernels."""
    package("apex", __init__="__version__ = '0.9.10'", security="")
    libraries = find_libraries()
    assert "apex" in sys.modules  # it was found, and seen through
    assert libraries.apex is None and libraries.fused_adam is None


@pytest.mark.parametrize("missing", ["optimizers", "multi_tensor_apply"])
def test_half_an_apex_counts_as_absent(missing: str, package: Callable[..., None]) -> None:
    package("apex", **{name: "" for name in ("optimizers", "multi_tensor_apply") if name != missing})
    assert find_libraries().apex is None


def test_nvidias_apex_is_found_with_its_version(package: Callable[..., None]) -> None:
    package("apex", __init__="__version__ = '0.1'", optimizers="", multi_tensor_apply="")
    libraries = find_libraries()
    assert libraries.apex == "0.1" and libraries.fused_adam == "apex"
    assert not libraries.fused_weight_gradient  # a module of its own


def test_transformer_engine_goes_before_apex(package: Callable[..., None]) -> None:
    package("apex", optimizers="", multi_tensor_apply="")
    package("transformer_engine", __init__="__version__ = '2.8'", pytorch="")
    package("fused_weight_gradient_mlp_cuda")
    libraries = find_libraries()
    assert libraries.transformer_engine == "2.8" and libraries.apex == "unknown"
    assert libraries.fused_adam == "transformer_engine" and libraries.fused_weight_gradient


def test_a_library_that_fails_to_import_counts_as_absent(package: Callable[..., None]) -> None:
    package("transformer_engine", pytorch="import no_such_module_at_all")
    assert find_libraries().transformer_engine is None


def test_a_library_without_its_shared_objects_counts_as_absent(package: Callable[..., None]) -> None:
    """Transformer Engine loads CUDA's libraries with ctypes, which raises OSError where there are none."""
    package("transformer_engine", pytorch="import ctypes; ctypes.CDLL('libcublas_that_is_not_there.so.13')")
    assert find_libraries().transformer_engine is None


def test_a_cpu_platform_says_what_it_runs_on() -> None:
    assert not CPU.is_cuda and CPU.layers == "torch" and CPU.gradient_accumulation_fusion is None
    line = CPU.describe()
    for part in ("cpu (gloo)", "torch 2.13.0", "Megatron-Core 0.16.1", "layers torch", "torch AdamW", "gradient off"):
        assert part in line


def test_a_gpu_platform_says_what_it_runs_on() -> None:
    assert GPU.is_cuda and GPU.layers == "transformer_engine" and GPU.gradient_accumulation_fusion == "apex"
    line = GPU.describe()
    for part in ("cuda (nccl)", "transformer_engine 2.8", "transformer_engine FusedAdam", "weight gradient apex"):
        assert part in line


def test_the_cpus_libraries_do_not_drive_a_cpu() -> None:
    """Installed is not used: on a CPU the optimizer is torch's, whatever else is there."""
    line = replace(GPU, device=torch.device("cpu"), backend="gloo").describe()
    assert "torch AdamW" in line and "2.8" not in line and "gradient off" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_this_process_runs_on_the_cpu(one_rank_platform: Platform) -> None:
    assert one_rank_platform.device == torch.device("cpu") and one_rank_platform.backend == "gloo"
    assert current_platform() is one_rank_platform  # decided once


def test_a_gpu_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("megatron_flowrl.platform.cuda_stand_in.is_installed", lambda: False)
    monkeypatch.setattr("megatron_flowrl.platform.find_libraries", lambda: LIBRARIES)
    with pytest.raises(UserError, match=r"Transformer Engine cannot be imported.*CUDA_VISIBLE_DEVICES="):
        current_platform.__wrapped__()


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("megatron_flowrl.platform.cuda_stand_in.is_installed", lambda: False)
    monkeypatch.setattr("megatron_flowrl.platform.find_libraries", lambda: GPU.libraries)
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 are visible"):
        current_platform.__wrapped__(2)


def test_fp8_on_a_cpu_is_emulated_and_says_so() -> None:
    precision = PrecisionConfig(fp8="hybrid")
    check_platform(Config(precision=precision), CPU)
    assert "FP8 emulated" in CPU.describe("hybrid") and "FP8" not in CPU.describe() + GPU.describe("hybrid")


def test_what_the_emulation_cannot_do_is_refused() -> None:
    gathered = PrecisionConfig(fp8="hybrid", fp8_param_gather=True)
    with pytest.raises(UserError, match=r"precision.fp8_param_gather = true needs Transformer Engine on a GPU"):
        check_platform(Config(precision=gathered), CPU)
    delayed = PrecisionConfig(fp8="hybrid", fp8_recipe="delayed")
    again = (
        RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        RecomputeConfig(recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
    )
    for recompute in again:
        with pytest.raises(UserError, match=r"fp8_recipe = delayed does not go with recomputed linear layers"):
            check_platform(Config(precision=delayed, recompute=recompute), CPU)
        check_platform(Config(precision=replace(delayed, fp8_recipe="blockwise"), recompute=recompute), CPU)
    check_platform(Config(precision=delayed, recompute=RecomputeConfig(recompute_granularity="selective")), CPU)


def test_without_fp8_any_machine_will_do() -> None:
    check_platform(Config(), CPU)
    check_platform(Config(), GPU)


@pytest.mark.parametrize(
    ("recipe", "needed"),
    [("delayed", (8, 9)), ("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))],
)
def test_fp8_recipes_need_a_gpu_that_has_them(
    recipe: Any, needed: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(precision=PrecisionConfig(fp8="e4m3", fp8_recipe=recipe))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: needed)
    check_platform(config, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=rf"fp8_recipe = '{recipe}' .* {needed[0]}\.{needed[1]} .*; this one has 8\.0"):
        check_platform(config, GPU)
