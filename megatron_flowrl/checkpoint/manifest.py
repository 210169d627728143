"""What a checkpoint says of itself: manifest.json, the last file that is written into it.

It holds what has to be known before anything is loaded, and the size and SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass

from megatron_flowrl.config import UserError
from megatron_flowrl.model.architecture import Architecture

FORMAT = 1
MANIFEST_FILE = "manifest.json"

_STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FileRecord:
    """Size in bytes and SHA-256, in hexadecimal, of one file."""

    size: NonNegativeInt
    sha256: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Manifest:
    """`step` counts optimizer updates of the loop; `progress` is the loop's own, such as its place in the data.

    `parts` says what was saved: "model", and after training "optimizer" and "schedule" too.
    """

    format: int = FORMAT
    step: NonNegativeInt
    parts: list[str]
    progress: dict[str, int]
    architecture: dict[str, Any]
    config: dict[str, Any]
    layout: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def check_architecture(self, architecture: Architecture, where: Path) -> None:
        """Raise UserError naming every difference from the model that the checkpoint is to be loaded into."""
        expected = _plain(asdict(architecture))
        differing = [
            f"{key} is {self.architecture.get(key)} in the checkpoint and {value} in the model"
            for key, value in expected.items()
            if key not in _MAY_DIFFER and self.architecture.get(key) != value
        ]
        if differing:
            raise UserError(
                f"checkpoint {where} is of another architecture: {'; '.join(_short(d) for d in differing)}; "
                "give the model.path it was trained from, or another checkpoint"
            )


# What the weights do not depend on: it may be edited in config.json between two starts.
_MAY_DIFFER = ("max_sequence_length", "initializer_range")


def _plain(value: Any) -> Any:
    """As JSON brings it back."""
    return json.loads(json.dumps(value))


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    """For `Manifest.architecture`."""
    plain: dict[str, Any] = _plain(asdict(architecture))
    return plain


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Into a folder that is not published yet."""
    content = json.dumps(asdict(manifest), indent=1)
    (folder / MANIFEST_FILE).write_text(content + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where it is missing, damaged, or of a later format."""
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a whole checkpoint: it has no {MANIFEST_FILE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if isinstance(content, dict) and isinstance(found := content.get("format"), int) and found > FORMAT:
        raise UserError(f"{path} has format {found}; this version reads up to {FORMAT}: use a newer megatron-flowrl")
    try:
        return pydantic.TypeAdapter(Manifest).validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {where}: {first['msg']}") from error


def record_file(path: Path) -> FileRecord:
    """Read a file for its size and checksum."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(size=path.stat().st_size, sha256=digest)


def problem_with(folder: Path, name: str, record: FileRecord, *, checksum: bool = True) -> str | None:
    """What is wrong with one file of a checkpoint; None for nothing."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{path} is damaged: {size} bytes, {record.size} were written"
        if checksum and record_file(path).sha256 != record.sha256:
            return f"{path} is damaged: its SHA-256 is not the one that was recorded"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None


def record_files(folder: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Records of all files in `folder`, those in `known` taken as they are."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name: known.get(name) or record_file(folder / name) for name in names if name != MANIFEST_FILE}
