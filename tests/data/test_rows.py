"""Rows of files, folders and the hub: what is read, and what is said of what is no row."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_flowrl.config import UserError
from megatron_flowrl.data.rows import BadRow, read_rows, rows_of, value_of
from tests.tiny_tasks import write_rows

ROWS = [{"prompt": [{"role": "user", "content": "two"}], "answer": 2}, {"prompt": [], "answer": 3}]


def read(path: Path | str, limit: int | None = None) -> list[tuple[str, Any]]:
    """Place and row of all rows."""
    return read_rows(rows_of(str(path), "train"), lambda row, place: (place, row), "there is none", limit)


def problems_of(path: Path | str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        read(path)
    return caught.value.problems


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    jsonl, parquet = write_rows(tmp_path / "a.jsonl", ROWS), write_parquet(tmp_path / "b.parquet", ROWS)
    assert read(jsonl) == [(f"{jsonl}:{number}", row) for number, row in enumerate(ROWS, start=1)]
    assert read(parquet) == [(f"{parquet}: row {number}", row) for number, row in enumerate(ROWS, start=1)]
    assert read(jsonl, limit=1) == [(f"{jsonl}:1", ROWS[0])]


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", ROWS[:1])
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("no data")
    assert [row for _, row in read(tmp_path)] == [*ROWS, ROWS[0]]


def test_of_a_bad_line_file_and_line_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 6 + '{"a": 1\n' + '{"a": 1}\n[1]\n')
    first, second = problems_of(path)
    assert first.startswith(f"{path}:7: not JSON") and second.startswith(f"{path}:9: a JSON list, not an object")


def test_a_mark_at_the_start_of_a_file_is_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read(path) == [(f"{path}:1", {"a": 1})]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("./gone", None, "there is no file or folder"),
        ("empty.jsonl", b"\n", "there is none"),
        ("damaged.parquet", b"PAR1 no more", "cannot be read as Parquet"),
        ("rows.csv", b"a,b", "is no .jsonl, .json, .parquet file"),
    ],
)
def test_what_is_no_data(name: str, content: bytes | None, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems_of(f"{tmp_path}/{name}")
    assert what in problem


def test_a_folder_without_data(tmp_path: Path) -> None:
    assert "has no .jsonl, .json, .parquet file" in problems_of(tmp_path)[0]


def test_a_column_may_be_inside_another() -> None:
    row = {"reward_model": {"ground_truth": "4"}, "a.b": 5}
    assert value_of(row, "reward_model.ground_truth") == "4" and value_of(row, "a.b") == 5
    with pytest.raises(BadRow, match=r"the key reward_model\.style is missing; there are reward_model, a\.b"):
        value_of(row, "reward_model.style")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        if name != "some/data":
            raise FileNotFoundError(f"no {name}")
        return [{"prompt": split if configuration is None else configuration}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("some/data") == [("some/data[train]: row 1", {"prompt": "train"})]
    assert read("some/data:main") == [("some/data:main[train]: row 1", {"prompt": "main"})]
    (problem,) = problems_of("other/data")
    assert "its split 'train' cannot be loaded (no other/data)" in problem
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets: pip install" in problems_of("some/data")[0]
