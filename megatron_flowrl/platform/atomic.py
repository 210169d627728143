"""Files and folders that are on disk whole or not there, whatever is killed when."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial-"


def partial_path(final: Path, token: str) -> Path:
    """Where what will be `final` is written; `token` tells attempts apart. Hidden, and on the same file system."""
    return final.parent / f".{final.name}{_PARTIAL}{token}"


def is_partial(path: Path) -> bool:
    """Whether `path` is what an attempt that was cut off has left behind."""
    return path.name.startswith(".") and _PARTIAL in path.name


def final_path(partial: Path) -> Path:
    """What `partial_path` was given."""
    return partial.parent / partial.name.removeprefix(".").rpartition(_PARTIAL)[0]


def publish(partial: Path, final: Path) -> None:
    """Give the finished folder its name, after everything in it has reached the disk. `final` must not exist."""
    for folder, _, files in os.walk(partial):
        for file in files:
            sync(Path(folder) / file)
        sync(Path(folder))
    os.rename(partial, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: str) -> None:
    """Replace a file's content in one step."""
    write_bytes(path, content.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content in one step."""
    partial = partial_path(path, str(os.getpid()))
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def remove(path: Path) -> None:
    """Delete a folder or file; cut off midway, what is left does not look like something whole."""
    partial = path if is_partial(path) else partial_path(path, "removed")
    if partial != path:
        os.rename(path, partial)
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink()


def partials_in(folder: Path) -> Iterator[Path]:
    """What attempts that were cut off have left behind in `folder`."""
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if is_partial(path))
