"""Rows of a public data set into rows of prompts: read, put into another form, counted, written whole.

The data set is a JSONL or Parquet file, a folder of such files, or, where its name is given, on the Hugging Face hub
(pip install -e '.[hub]'; it needs the network).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.data.rows import BadRow, Raw, Row, read_rows, rows_of
from megatron_flowrl.evaluation.published import LeftOut
from megatron_flowrl.platform.atomic import write_bytes

Form = Callable[[Row], Mapping[str, Any]]
NOT_READABLE = "it cannot be read"


def formed(
    sources: Sequence[str], split: str, form: Form, left_out: Counter[str], *, leave_out_bad_rows: bool = False
) -> list[Mapping[str, Any]]:
    """The rows that `form` makes. What it leaves out (LeftOut) is counted by its reason.

    Raises UserError with the place of every row that it finds bad (BadRow), unless these are left out, too.
    """

    def read(row: Row, _: str) -> Mapping[str, Any] | None:
        try:
            return form(row)
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except BadRow:
            if not leave_out_bad_rows:
                raise
            left_out[NOT_READABLE] += 1
        return None

    def rows() -> Iterator[tuple[str, Raw]]:
        for source in sources:
            yield from rows_of(source, split)

    found = [row for row in read_rows(rows(), read, f"{', '.join(sources)}: no rows") if row is not None]
    if not found:
        raise UserError(f"{', '.join(sources)}: no row is left ({told(left_out)})")
    return found


def told(left_out: Counter[str]) -> str:
    """What was left out, and why."""
    return "; ".join(f"left out {count}: {reason}" for reason, count in left_out.most_common()) or "none left out"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A line a row; the file is whole, or not there. Raises UserError."""
    content = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def run(work: Callable[[], object]) -> None:
    """Exits with status 2 and a message where the user's input is at fault."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


__all__ = ["NOT_READABLE", "formed", "run", "told", "write_jsonl"]
