"""The schema as a flat table of dotted keys: what loading, messages and help read."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any, TypeGuard, get_type_hints

from pydantic import TypeAdapter

from .schema import Config
from .strict import STRICT


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting."""

    name: str
    """Dotted: `optimizer.lr`."""

    default: object

    meaning: str

    adapter: TypeAdapter[Any]
    """Validates one value of this setting."""

    allowed: str
    """The type and range in words: `int > 0 or null`."""


def show(value: object) -> str:
    """A value as one would type it in a recipe."""
    return value if isinstance(value, str) and value else json.dumps(value)


def nearest_key(wrong: str) -> str | None:
    """The existing key most like `wrong`.

    Its last part counts first, so that a right name under a wrong section, or under none, is found; but a name much
    like it in the section that was given comes before the same name in another.
    """
    section, _, last = wrong.rpartition(".")

    def likeness(name: str) -> tuple[float, float]:
        its_section, _, its_last = name.rpartition(".")
        ratio = _ratio(last, its_last)
        return ratio + (its_section == section and ratio >= 0.75), _ratio(wrong, name)

    best = max(KEYS, key=likeness)
    return best if likeness(best)[0] >= 0.6 else None


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def _is_section(hint: object) -> TypeGuard[type[Any]]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _sections(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    for name, hint in get_type_hints(cls).items():
        if _is_section(hint):
            yield prefix + name, hint
            yield from _sections(hint, f"{prefix}{name}.")


def _keys(cls: type[Any], prefix: str = "") -> Iterator[Key]:
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if _is_section(hint):
            yield from _keys(hint, f"{name}.")
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=STRICT)
        meaning = " ".join(cls.__pydantic_fields__[field.name].description.split())
        yield Key(name, field.default, meaning, adapter, _in_words(adapter.json_schema()))


def _in_words(json_schema: Mapping[str, Any]) -> str:
    if "anyOf" in json_schema:
        return " or ".join(_in_words(choice) for choice in json_schema["anyOf"])
    if "enum" in json_schema:
        return "one of " + ", ".join(json_schema["enum"])
    name = _TYPES[json_schema["type"]]
    if {"minLength", "minItems"} & json_schema.keys():
        name = f"non-empty {name}"
    if "items" in json_schema:
        return f"{name} of {_in_words(json_schema['items']).removeprefix('one of ')}"
    bounds = [f"{sign} {json_schema[word]}" for word, sign in _BOUNDS.items() if word in json_schema]
    return f"{name} {' and '.join(bounds)}".strip()


_TYPES = {
    "integer": "int",
    "number": "float",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "null": "null",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


SECTIONS: Mapping[str, type[Any]] = dict(_sections(Config))
"""Section name -> its dataclass."""

KEYS: Mapping[str, Key] = {key.name: key for key in _keys(Config)}
"""Dotted name -> setting, in the order of the schema."""
