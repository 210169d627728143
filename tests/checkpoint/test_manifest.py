"""The manifest: what it holds comes back, and what it does not match is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.checkpoint.manifest import (
    Manifest,
    describe_architecture,
    problem_with,
    read_manifest,
    record_file,
    record_files,
    write_manifest,
)
from megatron_flowrl.config import UserError
from megatron_flowrl.model.architecture import architecture_of
from tests.tiny_models import MODELS

ARCHITECTURE = architecture_of(MODELS["qwen2"])


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data").write_bytes(b"abc" * 1000)
    (tmp_path / "empty").touch()
    manifest = Manifest(
        step=3,
        parts=["model"],
        progress={"consumed_sequences": 2**40},
        architecture=describe_architecture(ARCHITECTURE),
        config={"seed": 1},
        layout={"world_size": 2},
        versions={"torch": "2"},
        files=record_files(tmp_path, {}),
    )
    write_manifest(tmp_path, manifest)
    return manifest


def test_it_comes_back(tmp_path: Path, manifest: Manifest) -> None:
    assert read_manifest(tmp_path) == manifest
    assert manifest.files.keys() == {"sub/data", "empty"}
    manifest.check_architecture(ARCHITECTURE, tmp_path)


def test_whole_files_have_no_problem(tmp_path: Path, manifest: Manifest) -> None:
    assert [problem_with(tmp_path, *item) for item in manifest.files.items()] == [None, None]


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "2999 bytes, 3000 were written"),
        (lambda path: path.write_bytes(b"\x00" + path.read_bytes()[1:]), "its SHA-256 is not the one"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "bytes, 3000 were written"),
    ],
)
def test_damage_is_named(tmp_path: Path, manifest: Manifest, change: Any, problem: str) -> None:
    change(tmp_path / "sub" / "data")
    found = problem_with(tmp_path, "sub/data", manifest.files["sub/data"])
    assert found is not None and str(tmp_path / "sub" / "data") in found and problem in found


def test_sizes_alone_do_not_find_a_flipped_bit(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / "sub" / "data"
    path.write_bytes(b"\x00" + path.read_bytes()[1:])
    assert problem_with(tmp_path, "sub/data", manifest.files["sub/data"], checksum=False) is None


def test_known_records_are_not_read_again(tmp_path: Path, manifest: Manifest) -> None:
    known = {"empty": replace(record_file(tmp_path / "empty"), sha256="from the writer")}
    assert record_files(tmp_path, known)["empty"].sha256 == "from the writer"


@pytest.mark.parametrize(
    "content, problem",
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 2}', "has format 2; this version reads up to 1: use a newer megatron-flowrl"),
        ('{"format": 1}', "is damaged: step: Field required"),
        ("\xff", "is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=problem):
        read_manifest(tmp_path)


def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, manifest: Manifest) -> None:
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["files"]["empty"]["size"] = -1
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"files\.empty\.size: Input should be greater than or equal to 0"):
        read_manifest(tmp_path)


def test_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a whole checkpoint: it has no manifest\.json"):
        read_manifest(tmp_path)


def test_another_architecture_is_named_with_every_difference(tmp_path: Path, manifest: Manifest) -> None:
    other = replace(ARCHITECTURE, hidden_size=64, tie_word_embeddings=True, max_sequence_length=7)
    with pytest.raises(UserError) as caught:
        manifest.check_architecture(other, tmp_path)
    message = str(caught.value)
    assert "hidden_size is 48 in the checkpoint and 64 in the model" in message
    assert "tie_word_embeddings is False in the checkpoint and True in the model" in message
    assert "max_sequence_length" not in message  # weights do not depend on it
