"""The architecture of a recipe's model: from its folder, or from the table of published shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
import yaml

from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.config import UserError
from megatron_flowrl.model.architecture import Architecture, architecture_of, read_architecture


@dataclass(frozen=True)
class Shapes:
    """An architecture, and where it is from, for people; `note` where that is not what a run would read."""

    architecture: Architecture
    note: str | None = None


def find_shapes(path: str) -> Shapes:
    """Of `model.path`: a Hugging Face folder or checkpoint; where there is none, a model that the table knows by name.

    Raises UserError where it is neither.
    """
    if Path(path).exists():
        return Shapes(read_architecture(locate_model(path).hugging_face))
    name = path.rstrip("/").rpartition("/")[2]
    if name not in published_models():
        raise UserError(
            f"model.path = {path!r} is no folder, and no model whose shape is known by name; give a folder with its "
            f"config.json, or one of {', '.join(published_models())}"
        )
    note = f"model.path = {path!r} is not on this machine: planned with the published shape of {name}; a run needs it"
    return Shapes(architecture_of(hugging_face_config(name), where=f"the published shape of {name}"), note)


@cache
def published_models() -> tuple[str, ...]:
    """Names of the table."""
    return tuple(_table())


def hugging_face_config(name: str) -> Any:
    """transformers' configuration of a model of the table."""
    entry = _table()[name]
    if "like" in entry:
        entry = {**_table()[entry["like"]], **{key: value for key, value in entry.items() if key != "like"}}
    settings = {key: value for key, value in entry.items() if key not in ("model_type", "rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", **entry.get("rope_scaling", {}), "rope_theta": entry["rope_theta"]}
    return transformers.AutoConfig.for_model(entry["model_type"], **settings, rope_parameters=rope)


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = yaml.safe_load(files(__package__).joinpath("models.yaml").read_text())
    return table


__all__ = ["Shapes", "find_shapes", "hugging_face_config", "published_models"]
