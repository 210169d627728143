"""YAML recipes and `a.b=value` overrides, read into flat settings that remember where they came from.

Scalars follow YAML 1.2 (its core schema, less octal and hexadecimal numbers): `1e-6` is a float, while `off`,
`1:30`, `012` and `2024-01-01` stay text, which PyYAML's YAML 1.1 would turn into something else unasked.

A recipe may be layered on another, `base: other.yaml` (a path seen from its own folder), which may have a base too.
What the upper one gives holds: a value, a list, or null takes the place of what is below it, key by key.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .keys import KEYS, SECTIONS

BASE = "base"
"""The key of a recipe, not of the schema, that names the recipe it is layered on."""


@dataclass(frozen=True)
class Setting:
    """One value for one dotted key, not yet checked against the schema."""

    key: str

    value: Any

    text: str
    """The value as it was written."""

    source: str
    """`FILE:LINE` or `command line`."""


def read_recipe(path: str | os.PathLike[str], problems: list[str]) -> list[Setting]:
    """The settings of a YAML file, after those of the recipes it is layered on; later ones hold.

    What cannot be read is added to `problems`, with its line.
    """
    return _layers(os.fspath(path), problems, ())


def _layers(file: str, problems: list[str], above: tuple[str, ...]) -> list[Setting]:
    """`above` are the recipes that are layered on this one, the uppermost first."""
    settings, below = [], []
    for setting in _read_file(file, problems):
        if setting.key != BASE:
            settings.append(setting)
            continue
        base = setting.value
        written = f"{setting.source}: {BASE} = {setting.text}"
        if not isinstance(base, str) or not base:
            problems.append(f"{written}: must be the path of a recipe, seen from this one's folder")
            continue
        base, chain = os.path.join(os.path.dirname(file), base), (*above, file)
        if os.path.realpath(base) in map(os.path.realpath, chain):
            problems.append(f"{written}: these recipes are layered in a circle: {' -> '.join((*chain, base))}")
            continue
        found: list[str] = []
        below = _layers(base, found, chain)
        problems += found if os.path.isfile(base) else [f"{written}: {problem}" for problem in found]
    return [*below, *settings]


def _read_file(file: str, problems: list[str]) -> list[Setting]:
    try:
        with open(file, "rb") as stream:
            text = stream.read().decode()
        root = _compose(text)
    except OSError as error:
        problems.append(f"recipe {file!r} cannot be read: {error.strerror}")
        return []
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        problems.append(f"{file}:{line}: the recipe is not UTF-8 text (byte 0x{byte:02x})")
        return []
    except yaml.YAMLError as error:
        problems.append(f"{file}:{_error_line(error, text)}: not valid YAML: {_reason(error)}")
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        shown = _excerpt(root, text)
        problems.append(f"{file}:{_line(root)}: a recipe is keys with values, as in `seed: 1`, not {shown}")
        return []
    return list(_Walk(file, text, problems).settings(root))


def read_overrides(arguments: Sequence[str], problems: list[str]) -> list[Setting]:
    """The settings of `a.b=value` arguments; malformed ones are added to `problems`."""
    settings = []
    for argument in arguments:
        key, equals, text = (part.strip() for part in argument.partition("="))
        if not equals or not key:
            problems.append(f"command line: {argument!r} is not a setting; write section.key=value")
            continue
        written = f"command line: {key} = {text}"
        try:
            node = _compose(text)
            value = None if node is None else _construct(node)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{written}: not a YAML value ({_reason(error)}); put it in quotes")
            continue
        if node is None:
            problems.append(f"{written}: there is no value; write {key}=null if null is meant")
        elif node.end_mark.index < len(text):
            problems.append(f"{written}: YAML reads {_excerpt(node, text)} and no further; put it in quotes")
        else:
            settings.append(Setting(key, value, text, "command line"))
    return settings


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Text that `read_recipe` reads back to the very same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class _Walk:
    """One pass over the nodes of a recipe."""

    file: str
    text: str
    problems: list[str]
    first_lines: dict[str, int] = field(default_factory=dict)
    """Dotted keys met so far: written nested or dotted, a key may come once."""

    def settings(self, parent: yaml.MappingNode, prefix: str = "") -> Iterator[Setting]:
        for key_node, node in parent.value:
            source = f"{self.file}:{_line(key_node)}"
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{source}: {_excerpt(key_node, self.text)} is no key; a key is a name")
                continue
            key = prefix + key_node.value
            if key in self.first_lines:
                first = self.first_lines[key]
                self.problems.append(f"{source}: {key} is given twice, first in line {first}; keep one")
                continue
            self.first_lines[key] = _line(key_node)
            if isinstance(node, yaml.MappingNode) and self._enters(key, node):
                yield from self.settings(node, f"{key}.")
                continue
            shown = _excerpt(node, self.text)
            try:
                value = _construct(node)
            except (yaml.YAMLError, ValueError) as error:
                self.problems.append(f"{source}: {key} = {shown}: not a YAML value ({_reason(error)})")
                continue
            if value is not None or key not in SECTIONS:
                yield Setting(key, value, shown, source)

    def _enters(self, key: str, node: yaml.MappingNode) -> bool:
        # An unknown section at the top is entered too, so that each of its keys can be told its right place.
        return key in SECTIONS or ("." not in key and key not in KEYS and key != BASE and bool(node.value))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - starts without PyYAML's YAML 1.1 scalars


class _Dumper(yaml.SafeDumper):
    """Puts in quotes any text that YAML 1.1, or `_Loader`, would take for something else."""


def _add_scalar(cls: type[_Loader] | type[_Dumper], tag: str, pattern: str, starts: str) -> None:
    cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), [*starts] or [""])


_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_NOT_FINITE = r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"

# The first that matches wins: int before float.
_add_scalar(_Loader, "null", "~|null|Null|NULL", "~nN")
_add_scalar(_Loader, "null", "", "")
_add_scalar(_Loader, "bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_add_scalar(_Loader, "int", "[-+]?(0|[1-9][0-9_]*)", "-+0123456789")
_add_scalar(_Loader, "float", f"{_NUMBER}|{_NOT_FINITE}", "-+.0123456789")
_add_scalar(_Dumper, "float", _NUMBER, "-+.0123456789")


def _compose(text: str) -> yaml.Node | None:
    return _Loader(text).get_single_node()


def _construct(node: yaml.Node) -> Any:
    return _Loader("").construct_document(node)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _excerpt(node: yaml.Node, text: str) -> str:
    written = " ".join(text[node.start_mark.index : node.end_mark.index].split()) or "null"
    return written if len(written) <= 60 else f"{written[:57]}..."


def _error_line(error: yaml.YAMLError, text: str) -> int:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return error.problem_mark.line + 1
    position = error.position if isinstance(error, yaml.reader.ReaderError) else 0
    return text.count("\n", 0, position) + 1


def _reason(error: yaml.YAMLError | ValueError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return error.problem or str(error)
    return error.reason if isinstance(error, yaml.reader.ReaderError) else str(error)
