"""Plain data as JSON and back: what crosses the walls of a jail, in either direction. Standard library only.

None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict of these, and nothing else: what comes
out is of exactly these types, whatever the other side sends, so that no comparison runs its code.

    list [..]   tuple {"t": [..]}   set {"s": [..]}   frozenset {"z": [..]}   dict {"d": [[key, value], ..]}
    bytes {"b": hex}   complex {"c": [real, imaginary]}   a float that is no number or infinite {"f": "nan"}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_DEEPEST = 200
_TAGS: Mapping[type, str] = {tuple: "t", set: "s", frozenset: "z"}
_MAKES: Mapping[str, Callable[[list[Any]], Any]] = {"t": tuple, "s": set, "z": frozenset}
_BASES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)


class NotPlain(ValueError):
    """The value, or the message, is no plain data."""


def encode(value: Any, depth: int = 0) -> Any:
    """A value as what json.dumps takes. An instance of a subclass goes as its base. Raises NotPlain."""
    if depth > _DEEPEST:
        raise NotPlain(f"more than {_DEEPEST} levels deep")
    kind = next((base for base in _BASES if isinstance(value, base)), None)
    if value is None or kind in (bool, int, str):
        return value if value is None or kind is None else kind(value)
    if kind is None:
        raise NotPlain(f"{type(value).__name__} is no plain data")
    if kind is float:
        return float(value) if math.isfinite(value) else {"f": repr(float(value))}
    if kind is complex:
        return {"c": [encode(value.real), encode(value.imag)]}
    if kind is bytes:
        return {"b": value.hex()}
    if kind is dict:
        return {"d": [[encode(key, depth + 1), encode(one, depth + 1)] for key, one in dict.items(value)]}
    parts = [encode(one, depth + 1) for one in value]
    return parts if kind is list else {_TAGS[kind]: parts}


def decode(message: Any, depth: int = 0) -> Any:
    """The value of what json.loads gave. Raises NotPlain."""
    if depth > _DEEPEST:
        raise NotPlain(f"more than {_DEEPEST} levels deep")
    if isinstance(message, list):
        return [decode(one, depth + 1) for one in message]
    if not isinstance(message, dict):
        return message
    if len(message) != 1:
        raise NotPlain("an object has one tag")
    ((tag, content),) = message.items()
    try:
        if tag in _MAKES:
            return _MAKES[tag]([decode(one, depth + 1) for one in content])
        if tag == "d":
            return {decode(key, depth + 1): decode(one, depth + 1) for key, one in content}
        if tag == "b":
            return bytes.fromhex(content)
        if tag == "c":
            return complex(*(decode(part) for part in content))
        if tag == "f" and content in ("nan", "inf", "-inf"):
            return float(content)
    except (TypeError, ValueError) as error:
        raise NotPlain(f"{tag!r} with what does not belong there: {error}") from None
    raise NotPlain(f"no such tag: {tag!r}")


def same_value(found: Any, expected: Any) -> bool:
    """Whether two values from `decode` are equal; tuples count as lists, for JSON, and so many a data set, has none."""
    return bool(_listed(found) == _listed(expected))


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_listed(one) for one in value]
    return {key: _listed(one) for key, one in value.items()} if isinstance(value, dict) else value


__all__ = ["NotPlain", "decode", "encode", "same_value"]
