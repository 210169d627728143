"""What a Hugging Face folder holds beside weights: configuration, generation settings, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_flowrl.config import UserError

_CONFIG, _GENERATION = "config.json", "generation_config.json"
# Names that transformers, vLLM and tokenizers look for, over all families.
_NAMES = (
    _CONFIG,
    _GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_FOLDERS = ("additional_chat_templates",)


def read_companions(folder: Path) -> dict[str, bytes]:
    """Path inside the folder -> content. Raises UserError where there is no config.json, or one cannot be read."""
    found = [folder / name for name in _NAMES]
    found += [path for name in _FOLDERS for path in sorted((folder / name).rglob("*"))]
    try:
        contents = {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    if _CONFIG not in contents:
        raise UserError(f"{folder / _CONFIG} does not exist: it has to go into the checkpoint")
    return contents


def write_companions(contents: Mapping[str, bytes], target: Path, dtype: torch.dtype | None = None) -> None:
    """Into the folder `target`; a `dtype` goes into config.json, whose weights it then describes."""
    for name, content in contents.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    if dtype is not None:
        config = _read_json(target / _CONFIG)
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        (target / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stop_token_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer of the Hugging Face model in `folder`: `eos_token_id`, one number or a list.

    That of generation_config.json, as far as it has one, else that of config.json, as transformers does. Empty for a
    model without EOS, whose answers end by their length alone. Raises UserError for a file or a value that will not do.
    """
    for name in (_GENERATION, _CONFIG):
        path = folder / name
        if name == _GENERATION and not path.is_file():
            continue
        value = _read_json(path).get("eos_token_id")
        if value is None:
            continue
        tokens = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise UserError(f"{path}: eos_token_id = {value!r} must be a token id, or a list of them; mend the file")
        return tuple(dict.fromkeys(tokens))
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a model configuration: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content
