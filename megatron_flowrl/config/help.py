"""The manual of all settings, made from the schema."""

import inspect
import shutil
import textwrap
from collections.abc import Collection

from .keys import KEYS, SECTIONS, Key, show


def format_help(sections: Collection[str] | None = None, width: int | None = None) -> str:
    """Every key with its type, default and meaning; of `sections` only, if given.

    Lines are wrapped to `width` columns: the terminal's, unless given.
    """
    width = width or shutil.get_terminal_size().columns
    groups: dict[str, list[Key]] = {}
    for key in KEYS.values():
        group = key.name.partition(".")[0]
        if sections is None or group in sections:
            groups.setdefault(group, []).append(key)
    column = 4 + max((len(key.name) for keys in groups.values() for key in keys), default=0)
    return "\n\n".join(_format_group(name, keys, column, width) for name, keys in groups.items())


def _format_group(name: str, keys: list[Key], column: int, width: int) -> str:
    lines, section = [] if name in SECTIONS else [name], ""
    for key in keys:
        before, section = section, key.name.rpartition(".")[0]
        if section != before:
            lines.append(_wrap(f"{section}: {inspect.getdoc(SECTIONS[section])}", "", "  ", width))
        lines.append(_format_key(key, column, width))
    return "\n".join(lines)


def _format_key(key: Key, column: int, width: int) -> str:
    head = f"  {key.name}".ljust(column)
    facts = _wrap(f"{key.allowed}; default {show(key.default)}", head, " " * column, width)
    return f"{facts}\n{_wrap(key.meaning, '      ', '      ', width)}"


def _wrap(text: str, first: str, rest: str, width: int) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
