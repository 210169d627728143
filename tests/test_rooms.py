"""The rule of the house: imports point from left to right, and rooms of one cell do not import one another."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_flowrl"
CELLS = (
    ("__main__",),
    ("dry_run",),
    ("cli",),
    ("planning", "training"),
    ("evaluation",),
    ("rollout", "rewards"),
    ("checkpoint",),
    ("model",),
    ("ops",),
    ("objectives", "data", "observe"),
    ("platform",),
    ("config",),
    ("__init__",),  # the version, which everybody may read
)
PLACE = {room: place for place, cell in enumerate(CELLS) for room in cell}
LONGEST_FILE = 500


def imported_modules(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import wherever it stands: in functions, and for type checkers only, too.

    `from package import name` counts as `package.name`, which it may be; relative imports are resolved.
    """
    inside = (package.name, *file.relative_to(package).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def rooms_imported(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package's own rooms; a name of the package itself is in `__init__`."""
    for line, module in imported_modules(file, package):
        first, _, rest = module.partition(".")
        if first == package.name:
            room = rest.partition(".")[0]
            yield line, room if (package / room).is_dir() or (package / f"{room}.py").is_file() else "__init__"


def room_of(file: Path, package: Path) -> str:
    return file.relative_to(package).with_suffix("").parts[0]


def wrong_imports(package: Path) -> list[str]:
    """What breaks the rule, and files in no room of the plan."""
    found = []
    for file in sorted(package.rglob("*.py")):
        room, where = room_of(file, package), file.relative_to(package.parent)
        if room not in PLACE:
            found.append(f"{where}: the room {room!r} has no place in the rule")
            continue
        for line, other in rooms_imported(file, package):
            if other != room and (other not in PLACE or PLACE[other] <= PLACE[room]):
                found.append(f"{where}:{line}: {room} imports {other}")
    return found


def others_than(allowed: frozenset[str], file: Path, package: Path) -> list[str]:
    """Top-level packages imported that are neither allowed nor the standard library nor the file's own room."""
    own = f"{package.name}.{room_of(file, package)}."
    return [
        f"{file.relative_to(package.parent)}:{line}: {module}"
        for line, module in imported_modules(file, package)
        if module.partition(".")[0] not in allowed | sys.stdlib_module_names and not module.startswith(own)
    ]


def test_imports_point_from_left_to_right() -> None:
    assert wrong_imports(PACKAGE) == []


def test_objectives_import_torch_only() -> None:
    files = sorted((PACKAGE / "objectives").rglob("*.py"))
    assert [wrong for file in files for wrong in others_than(frozenset({"torch"}), file, PACKAGE)] == []


def test_packing_imports_the_standard_library_only() -> None:
    file = PACKAGE / "data" / "packing.py"
    assert others_than(frozenset(), file, PACKAGE) == []
    assert not [module for _, module in imported_modules(file, PACKAGE) if module.startswith(PACKAGE.name)]


def test_no_file_is_two_ideas() -> None:
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("ops/a.py", "import torch, json\nfrom house.data.b import c", None),
        ("ops/a.py", "from house import __version__\nfrom . import b\nfrom .b import c", None),
        ("cli.py", "def main():\n    from .training.loop import train", None),
        ("ops/a.py", "from house.model import gpt", "house/ops/a.py:1: ops imports model"),
        ("ops/a.py", "import torch\nimport house.model.gpt", "house/ops/a.py:2: ops imports model"),
        ("ops/a.py", "from house import model", "house/ops/a.py:1: ops imports model"),
        ("ops/a.py", "from ..model.gpt import x", "house/ops/a.py:1: ops imports model"),
        ("ops/a.py", "from .. import model", "house/ops/a.py:1: ops imports model"),
        ("ops/deep/a.py", "from ...model import x", "house/ops/deep/a.py:1: ops imports model"),
        ("ops/a.py", "def f():\n    import house.model", "house/ops/a.py:2: ops imports model"),
        ("data/a.py", "from house.observe import log", "house/data/a.py:1: data imports observe"),
        ("config/a.py", "from house.cli import main", "house/config/a.py:1: config imports cli"),
        ("attic/a.py", "", "house/attic/a.py: the room 'attic' has no place in the rule"),
    ],
)
def test_the_rule_finds_what_breaks_it(file: str, content: str, problem: str | None, tmp_path: Path) -> None:
    house = tmp_path / "house"
    for room in ("model", "data", "observe", "training"):
        (house / room).mkdir(parents=True)
        (house / room / "__init__.py").touch()
    (house / "cli.py").touch()
    (house / "__init__.py").write_text("__version__ = '1'\n")
    (house / file).parent.mkdir(parents=True, exist_ok=True)
    (house / file).write_text(content)
    assert wrong_imports(house) == ([] if problem is None else [problem])


@pytest.mark.parametrize(
    ("content", "foreign"),
    [
        (
            "import math\nfrom torch import Tensor\nimport torch.nn.functional as F\nfrom house.objectives.a import b",
            [],
        ),
        ("import numpy", ["house/objectives/b.py:1: numpy"]),
        ("from house.data import batch", ["house/objectives/b.py:1: house.data.batch"]),
        ("import torchvision", ["house/objectives/b.py:1: torchvision"]),
    ],
)
def test_the_rule_finds_foreign_packages(content: str, foreign: list[str], tmp_path: Path) -> None:
    file = tmp_path / "house" / "objectives" / "b.py"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert others_than(frozenset({"torch"}), file, tmp_path / "house") == foreign
