"""From a recipe and command-line overrides to a `Config`, and back to YAML."""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .errors import UserError, collected
from .keys import KEYS, SECTIONS, nearest_key
from .presets import defaults_of
from .recipe import BASE, Setting, dump_yaml, read_overrides, read_recipe
from .schema import Config

_CONFIG: TypeAdapter[Config] = TypeAdapter(Config)


def load_config(
    recipe: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
    sections: Collection[str] | None = None,
    command: str = "this command",
) -> Config:
    """The defaults, changed by the YAML file `recipe` and those it is layered on, then by `overrides` such as
    `optimizer.lr=1e-6`.

    `objective.preset` and `objective.name` set the defaults of some (presets.py).

    `sections` are the top-level names that `command` reads (`seed` is one of them). An override elsewhere
    would do nothing and is refused; a recipe may serve several commands and hold them all.

    Only single values are judged here; `check_config` judges them together.

    Raises:
        UserError: with all the problems found, each with its file and line or `command line`.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for setting in read_recipe(recipe, problems) if recipe is not None else ():
        with collected(problems):
            values[setting.key] = _validated(setting)
    given: dict[str, tuple[Any, Setting]] = {}
    for setting in read_overrides(overrides, problems):
        with collected(problems):
            value = _validated(setting)
            _refuse_unread(setting, sections, command)
            first_value, first = given.setdefault(setting.key, (value, setting))
            if first_value != value:
                twice = f"given twice, as {first.text} and {setting.text}"
                raise UserError(f"{setting.source}: {setting.key} is {twice}; keep one")
    if problems:
        raise UserError(*problems)
    values |= {key: value for key, (value, _) in given.items()}
    chosen = [values.get(key, KEYS[key].default) for key in ("objective.preset", "objective.name")]
    values = {**defaults_of(*chosen), **values}
    config: Config = _build(Config, values)
    return config


def given_keys(recipe: str | os.PathLike[str] | None, overrides: Sequence[str]) -> set[str]:
    """The settings that a recipe or the command line gives, whatever their values; for what `load_config` accepts."""
    problems: list[str] = []
    settings = [*(read_recipe(recipe, problems) if recipe is not None else ()), *read_overrides(overrides, problems)]
    return {setting.key for setting in settings}


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts, lists and scalars, as YAML and JSON know them."""
    tree: dict[str, Any] = _CONFIG.dump_python(config, mode="json")
    return tree


def to_yaml(config: Config) -> str:
    """A recipe with every key, from which `load_config` makes an equal `Config`."""
    return dump_yaml(to_dict(config))


def _validated(setting: Setting) -> Any:
    key = KEYS.get(setting.key)
    if key is None:
        raise UserError(f"{setting.source}: {_why_unknown(setting.key)}")
    try:
        return key.adapter.validate_python(setting.value)
    except ValidationError:
        problem = f"{setting.source}: {setting.key} = {setting.text}: must be {key.allowed}"
        if "text" in key.allowed and isinstance(setting.value, bool | int | float):
            problem += '; put it in "quotes" if it is text'
        raise UserError(problem) from None


def _why_unknown(name: str) -> str:
    if name == BASE:
        return f"{BASE} is a recipe's: write it in the file that is layered on another"
    parts = name.split(".")
    for parent in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        if parent in KEYS:
            return f"{name}: there is no such key; {parent} is a single value ({KEYS[parent].allowed})"
    if name in SECTIONS:
        return f"{name} is a section, not a setting; {_choices(name)}"
    if nearest := nearest_key(name):
        return f"{name}: there is no such key; did you mean {nearest}?"
    return f"{name}: there is no such key; {_choices(name.rpartition('.')[0])}"


def _choices(section: str) -> str:
    if section not in SECTIONS:
        return f"the sections are {', '.join(SECTIONS)}"
    prefix = f"{section}."
    return f"the keys of {section} are " + ", ".join(key.removeprefix(prefix) for key in KEYS if key.startswith(prefix))


def _refuse_unread(setting: Setting, sections: Collection[str] | None, command: str) -> None:
    if sections is not None and setting.key.partition(".")[0] not in sections:
        raise UserError(
            f"{setting.source}: `{command}` does not read {setting.key}, so that setting it would do "
            f"nothing; leave it out ({command} reads {', '.join(sections)})"
        )


def _build(cls: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if name in SECTIONS:
            arguments[field.name] = _build(SECTIONS[name], values, f"{name}.")
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)
