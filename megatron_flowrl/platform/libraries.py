"""Which implementation of each accelerated part is present, and whether Megatron-Core is a version we know."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from importlib import metadata

from megatron_flowrl import __version__
from megatron_flowrl.config import UserError

MINIMUM_MEGATRON = (0, 16)
KNOWN_MEGATRON = ((0, 16), (0, 19))


@dataclass(frozen=True)
class Libraries:
    """Versions, or None where a library cannot be imported.

    `apex` is NVIDIA's, built from source; the package of that name on PyPI is another project and counts as absent.
    """

    torch: str
    megatron_core: str
    transformer_engine: str | None
    apex: str | None
    fused_weight_gradient: bool
    fused_adam: str | None  # "transformer_engine", "apex" or None, in Megatron's own order of preference


def find_libraries() -> Libraries:
    """Import and inspect. Raises UserError for a Megatron-Core that is too old; warns of an unknown one by name."""
    import torch

    transformer_engine = _version("transformer_engine", "transformer_engine.pytorch")
    apex = _version("apex", "apex.optimizers", "apex.multi_tensor_apply")
    return Libraries(
        torch=torch.__version__,
        megatron_core=_megatron_version(),
        transformer_engine=transformer_engine,
        apex=apex,
        fused_weight_gradient=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        fused_adam="transformer_engine" if transformer_engine else "apex" if apex else None,
    )


def versions() -> dict[str, str]:
    """Versions by name, of this program and of the libraries that results and files depend on."""
    libraries = find_libraries()
    found = {
        "megatron_flowrl": __version__,
        "megatron_core": libraries.megatron_core,
        "torch": libraries.torch,
        "transformer_engine": libraries.transformer_engine,
    }
    return {name: version for name, version in found.items() if version is not None}


def _version(package: str, *modules: str) -> str | None:
    try:
        for module in modules:
            importlib.import_module(module)
    except (ImportError, OSError):  # OSError: a shared library of CUDA is missing
        return None
    for distribution in (package, package.replace("_", "-")):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def _megatron_version() -> str:
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise UserError("megatron-core is not installed: pip install megatron-core==0.16.1") from None
    check_megatron_version(version)
    return version


def check_megatron_version(version: str) -> None:
    """Refuse what is too old for us, warn of what nobody has tried."""
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        release = (0, 0)
    known = ", ".join(".".join(map(str, v)) for v in KNOWN_MEGATRON)
    if release < MINIMUM_MEGATRON:
        raise UserError(f"megatron-core {version} is not supported: install one of {known}")
    if release not in KNOWN_MEGATRON:
        warnings.warn(f"megatron-core {version} is not a version this project is tested with ({known})", stacklevel=2)
