"""What a jail has beside Python's standard library: folders to read, and packages of this environment to import."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """`folders` can be read; from `paths` modules are imported. All are absolute."""

    folders: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


def library_of(folders: Sequence[str], packages: Sequence[str]) -> Library:
    """Folders that are read and imported from, and packages by their names.

    Of the folder that a package lies in, a jail with a file system of its own shows the package, and the shared
    libraries that its wheel came with (NAME.libs), and nothing else.

    Raises ValueError where there is no such folder or package.
    """
    for folder in folders:
        if not os.path.isabs(folder) or not os.path.isdir(folder):
            raise ValueError(f"{folder!r} is no folder's absolute path")
    read, paths = list(folders), list(folders)
    for name in packages:
        folder = _folder_of(name)
        read += [path for path in (folder, f"{folder}.libs") if os.path.isdir(path)]
        paths.append(os.path.dirname(folder))
    return Library(tuple(dict.fromkeys(read)), tuple(dict.fromkeys(paths)))


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ValueError(f"{package!r} is no package of this environment: install it, or leave it out")
    if not spec.submodule_search_locations or len(spec.submodule_search_locations) != 1:
        raise ValueError(f"{package!r} is no folder of modules; copy it into a folder, and name that as readable")
    return os.path.abspath(spec.submodule_search_locations[0])


__all__ = ["Library", "library_of"]
