"""Rows of data: JSONL and Parquet files, folders of them, and data sets of the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from megatron_flowrl.config import UserError

Row = Mapping[str, Any]
Raw = bytes | Row  # a line, or a row that is one already
_JSONL, _PARQUET = (".jsonl", ".json"), (".parquet",)
_MOST_PROBLEMS = 10
_T = TypeVar("_T")


class BadRow(Exception):
    """What is wrong with a row, in words."""


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """FILE:LINE and line, of a JSONL file; an empty line is one, but not at the file's end. Raises UserError."""
    try:
        with path.open("rb") as file:
            blank: list[tuple[str, bytes]] = []
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from blank
                    blank.clear()
                    yield f"{path}:{number}", line
                else:  # at the end of a file it does no harm; elsewhere lines out would not match lines in
                    blank.append((f"{path}:{number}", line))
    except FileNotFoundError:
        raise UserError(f"input file {str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"input file {str(path)!r} cannot be read: {reason}") from None


def rows_of(path: str, split: str) -> Iterator[tuple[str, Raw]]:
    """Place and row, of a file, of the files of a folder by their names, or of a data set of the hub.

    Raises UserError where there is no such thing.
    """
    given = Path(path)
    if given.is_dir():
        files = sorted(file for file in given.iterdir() if file.suffix in _JSONL + _PARQUET)
        if not files:
            raise UserError(f"the folder {path!r} has no {', '.join(_JSONL + _PARQUET)} file")
        for file in files:
            yield from _file(file)
    elif given.is_file() or given.suffix in _JSONL + _PARQUET:
        yield from _file(given)
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"there is no file or folder {path!r}; give a JSONL or Parquet file, or a folder of them")
    else:
        yield from _hub(path, split)


def read_rows(
    rows: Iterable[tuple[str, Raw]], read: Callable[[Row, str], _T], nothing: str, limit: int | None = None
) -> list[_T]:
    """`read(row, place)` of every row, up to `limit` of them.

    Raises UserError naming every row that is no object or of which `read` raises BadRow (the first ten), or, with the
    text `nothing`, where there is none.
    """
    found, problems = [], []
    for place, raw in islice(rows, limit):
        try:
            found.append(read(_parsed(raw) if isinstance(raw, bytes) else raw, place))
        except BadRow as error:
            problems.append(f"{place}: {error}")
    if not found and not problems:
        raise UserError(nothing)
    refuse(problems)
    return found


def refuse(problems: Sequence[str]) -> None:
    """Raise UserError with the first ten of the problems, if there are any."""
    if problems:
        left_out = len(problems) - _MOST_PROBLEMS
        raise UserError(*problems[:_MOST_PROBLEMS], *([f"and {left_out} more bad rows"] if left_out > 0 else []))


def value_of(row: Row, column: str) -> Any:
    """What is in a column; `a.b` is b within a where no column has that name. Raises BadRow."""
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise BadRow(f"the key {column} is missing; there are {', '.join(map(str, row)) or 'none'}")
        value = value[key]
    return value


def short(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _parsed(line: bytes) -> Row:
    if not line.strip():
        raise BadRow("an empty line; every line is a row: leave it out")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8 text ({error})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow(f"a JSON {type(row).__name__}, not an object with a key for each column")
    return row


def _file(path: Path) -> Iterator[tuple[str, Raw]]:
    if path.suffix in _JSONL or not path.exists():
        yield from lines_of(path)
        return
    if path.suffix not in _PARQUET:
        raise UserError(f"{str(path)!r} is no {', '.join(_JSONL + _PARQUET)} file")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{str(path)!r} cannot be read as Parquet: {str(error).strip() or type(error)}") from error


def _hub(name: str, split: str) -> Iterator[tuple[str, Raw]]:
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        hint = "HF_HUB_OFFLINE is set"
    else:
        hint = "is there a network, and is the name right?"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{name!r} is no file or folder here; as the name of a data set on the Hugging Face hub it needs the "
            "package datasets: pip install -e '.[hub]'"
        ) from error
    try:
        owner_and_name, _, configuration = name.partition(":")
        found = datasets.load_dataset(owner_and_name, configuration or None, split=split)
    except Exception as error:  # of the network, the hub, the data set or its format: all about this name
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"{name!r} is no file or folder here, and as a data set of the Hugging Face hub its split {split!r} cannot "
            f"be loaded ({reason}): {hint}"
        ) from error
    for number, row in enumerate(found, start=1):
        yield f"{name}[{split}]: row {number}", row


__all__ = ["BadRow", "Raw", "Row", "lines_of", "read_rows", "refuse", "rows_of", "short", "value_of"]
