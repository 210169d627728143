"""What a jail has beside Python's standard library: folders to read, and packages of this environment to import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Library:
    """`folders` can be read; from `paths` modules are imported. All are absolute."""

    folders: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


def library_of(folders: Sequence[str], packages: Sequence[str], *, namespaces: bool) -> Library:
    """Folders that are read and imported from, and packages by their names.

    Of the folder that a package lies in, a jail with a file system of its own shows the package, and the shared
    libraries that its wheel came with, and nothing else. Without namespaces all of that folder can be read, which has
    to be one of installed packages.

    Raises ValueError where there is no such folder or package.
    """
    for folder in folders:
        if not os.path.isabs(folder) or not os.path.isdir(folder):
            raise ValueError(f"{folder!r} is no folder's absolute path")
    read, paths = list(folders), list(folders)
    for name in packages:
        folder = _folder_of(name)
        parent = os.path.dirname(folder)
        if not namespaces and os.path.basename(parent) not in _INSTALLED:
            raise ValueError(f"{name!r} lies in {parent}, all of which programs could read without namespaces")
        read += [folder, *_shared_libraries(name, parent)]
        paths.append(parent)
    return Library(tuple(dict.fromkeys(read)), tuple(dict.fromkeys(paths)))


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ValueError(f"{package!r} is no package of this environment: install it, or leave it out")
    if not spec.submodule_search_locations or len(spec.submodule_search_locations) != 1:
        raise ValueError(f"{package!r} is no folder of modules; copy it into a folder, and name that as readable")
    return os.path.abspath(spec.submodule_search_locations[0])


def _shared_libraries(package: str, parent: str) -> list[str]:
    """Folders as numpy.libs or pillow.libs, by the names of the distributions."""
    found = {
        file.parts[0]
        for distribution in importlib.metadata.packages_distributions().get(package, ())
        for file in importlib.metadata.files(distribution) or ()
        if file.parts[0].endswith(".libs")
    }
    return [path for path in (os.path.join(parent, name) for name in sorted(found)) if os.path.isdir(path)]


__all__ = ["Library", "library_of"]
