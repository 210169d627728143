"""Which tokens end an answer, as the files beside the weights say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.checkpoint.companions import stop_token_ids
from megatron_flowrl.config import UserError


def folder(path: Path, config: Any, generation: Any = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 0, 7]}, None, (7, 0)),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 8]}, (9, 8)),
        ({"eos_token_id": 7}, {"eos_token_id": None}, (7,)),
        ({"eos_token_id": 7}, {"temperature": 0.6}, (7,)),
        ({"eos_token_id": None}, {}, ()),
        ({}, None, ()),
    ],
)
def test_stop_tokens(config: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert stop_token_ids(folder(tmp_path, config, generation)) == expected


@pytest.mark.parametrize("value", ["</s>", True, -1, 2.0, [1, None], {"id": 1}])
def test_what_is_no_token_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: eos_token_id = .* must be a token id"):
        stop_token_ids(folder(tmp_path, {"eos_token_id": value}))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        stop_token_ids(tmp_path)
