import pytest

from megatron_flowrl.config import format_help
from megatron_flowrl.config.keys import KEYS, SECTIONS, show


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_is_there_with_type_default_and_meaning(key):
    lines = [line.strip() for line in format_help(width=1000).splitlines()]
    (row,) = [row for row, line in enumerate(lines) if line.startswith(f"{key.name} ")]
    assert lines[row].removeprefix(key.name).strip() == f"{key.allowed}; default {show(key.default)}"
    assert lines[row + 1] == key.meaning


@pytest.mark.parametrize(
    ("name", "allowed", "default"),
    [
        ("precision.dtype", "one of bfloat16, float32", "bfloat16"),
        ("parallel.virtual_pipeline_model_parallel_size", "int >= 2 or null", "null"),
        ("optimizer.lr", "float >= 0", "1e-06"),
        ("recompute.recompute_modules", "non-empty list of core_attn, mlp", '["core_attn"]'),
        ("logging.progress", "true or false", "true"),
        ("model.path", "text", '""'),
    ],
)
def test_types_and_defaults_are_in_plain_words(name, allowed, default):
    assert (KEYS[name].allowed, show(KEYS[name].default)) == (allowed, default)


def test_every_section_says_what_it_is_about():
    text = format_help(width=1000)
    assert all(f"{section}: {cls.__doc__}" in text for section, cls in SECTIONS.items())


def test_only_the_sections_asked_for():
    text = format_help(["seed", "optimizer"])
    assert "optimizer.lr" in text and "\n  seed " in text and "parallel." not in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_lines_fit_the_width(width):
    assert max(map(len, format_help(width=width).splitlines())) <= width


def test_width_is_the_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "91")
    assert format_help() == format_help(width=91) != format_help(width=140)
