"""The benchmarks by name, and problems from files.

A file is JSONL or Parquet, a row a problem, in one of these forms (other columns do no harm; `id` may be left out), or
as the data sets of the hub have it (`published.py`):

    {"problem": text, "answer": text}                                     mathematics; also "question", "prompt"
    {"prompt": code, "entry_point": name, "test": code}                   as HumanEval; also "tests"
    {"problem": text, "inputs": [text, ..], "outputs": [text, ..]}        programs that read and write
    {"problem": text, "entry_point": name, "calls": [{"args", "expected"}, ..]}

`date`, as 2024-08-01, is what --since and --until go by. For CodeForces' rating also {"contest": name, "index": "A"}:
which contest's file the problem is in, and where.

A benchmark may also be a file of one's own: its rows are graded by reward.grader and asked as they are, or with
--template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.data.rows import BadRow, Raw, Row, read_rows, rows_of
from megatron_flowrl.evaluation.published import (
    LeftOut,
    answered,
    codeforces,
    date_of,
    livecodebench,
    mathematics,
    programs,
)
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rewards.find import check_ground_truth

MATH = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_BLOCK = "Reason first; put the whole program in one block that begins with ```python at the end."
PROGRAM = "{problem}\n\nWrite a Python program that reads from standard input and writes to standard output. " + _BLOCK
CALLED = "{problem}\n\nWrite it in Python, with the names that are given and the imports that it needs. " + _BLOCK
FUNCTION = (
    "Complete the Python function below, with the imports that it needs. " + _BLOCK + "\n\n```python\n{problem}\n```"
)
_TEXT_COLUMNS = ("problem", "question", "prompt")
_FILES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked and graded."""

    name: str
    grader: str

    template: str | None = None
    """Text around {problem}; None: by the kind of a program's tests."""

    hub: str | None = None
    """The data set of the Hugging Face hub that stands for it, as owner/name, or owner/name:configuration."""

    split: str = "test"
    form: Callable[[Row], Row] = mathematics
    packages: tuple[str, ...] = ()
    """Packages that its tests import."""


BENCHMARKS: Mapping[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark("aime24", "math", MATH, "HuggingFaceH4/aime_2024", "train"),
        Benchmark("aime25", "math", MATH, "math-ai/aime25"),
        Benchmark("amc23", "math", MATH, "math-ai/amc23"),
        Benchmark("math500", "math", MATH, "HuggingFaceH4/MATH-500"),
        Benchmark("minerva", "math", MATH, "math-ai/minervamath"),
        Benchmark("olympiadbench", "math", MATH, "math-ai/olympiadbench"),
        Benchmark("gsm8k", "math", MATH, "openai/gsm8k:main"),
        Benchmark("humaneval", "code", None, "openai/openai_humaneval", form=programs),
        Benchmark("humaneval+", "code", None, "evalplus/humanevalplus", form=programs, packages=("numpy",)),
        Benchmark("livecodebench", "code", None, "lighteval/code_generation_lite:release_v5", form=livecodebench),
        Benchmark("codeforces", "code", None, "open-r1/codeforces", form=codeforces),
    )
}
MATH_SIX = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")
"""The benchmarks of which the paper's table for mathematics has the unweighted mean."""


@dataclass(frozen=True)
class Problem:
    """A problem as it is asked and graded."""

    id: str
    prompt: str
    ground_truth: Any
    row: Row


@dataclass(frozen=True)
class Part:
    """Which of a benchmark's problems are wanted."""

    limit: int | None = None
    """So many problems, from the first."""

    since: str | None = None
    until: str | None = None
    """Dates, as 2024-08-01: from the first, and before the second."""

    def by_date(self) -> bool:
        """Whether it is told by dates."""
        return self.since is not None or self.until is not None

    def has(self, date: str | None) -> bool:
        """Whether a problem of this date, or of none, is wanted. Raises BadRow where it needs one."""
        if date is None and self.by_date():
            raise BadRow("it has no date (or contest_date, or contest_start), which --since and --until go by")
        return date is None or ((self.since or "") <= date and (self.until is None or date < self.until))


WHOLE = Part()


def benchmark_of(name: str) -> Benchmark:
    """Raises UserError for a name that is none."""
    if name not in BENCHMARKS:
        raise UserError(f"{name!r} is no benchmark, and no file; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def own_benchmark(file: str, grader: str, template: str | None) -> Benchmark:
    """A file of the user's as a benchmark. Raises UserError for a template that is none."""
    if template is not None and "{problem}" not in template:
        raise UserError(f"--template {template!r} has no {{problem}}, which is where a problem goes")
    form = programs if grader == "code" else mathematics if grader == "math" else answered
    if template is None and grader != "code":
        template = "{problem}"
    return Benchmark(Path(file).stem, grader, template, file, form=form)


def is_file(name: str) -> bool:
    """Whether what is to be evaluated is named as a file, and not as a benchmark."""
    return name not in BENCHMARKS and (name.endswith(_FILES) or "/" in name)


def read_problems(benchmark: Benchmark, path: str | None = None, part: Part = WHOLE) -> list[Problem]:
    """From a file, or the hub. Problems that cannot be graded here are left out, and counted in the log.

    Raises UserError naming every bad row, or where there is no data to be had.
    """
    source = path or benchmark.hub
    assert source is not None
    left_out: Counter[str] = Counter()
    found: list[Problem] = []
    numbers = iter(range(2**62))

    def read(row: Row, _: str) -> None:
        number = next(numbers)
        if not part.has(date_of(row) if part.by_date() else None):
            left_out["it is of another time"] += 1
            return
        try:
            row = benchmark.form(row)
        except LeftOut as reason:
            left_out[str(reason)] += 1
            return
        truth = _ground_truth(benchmark, row)
        trouble = check_ground_truth(benchmark.grader, truth, row)
        if trouble is not None:
            raise BadRow(trouble)
        template = benchmark.template or _template_of(truth)
        prompt = template.replace("{problem}", _text(row))
        tests = truth if benchmark.grader == "code" else ()  # which may be long, and go to the graders once
        rest = {name: value for name, value in row.items() if name not in tests}
        names = (row[column] for column in ("id", "task_id") if row.get(column) is not None)
        found.append(Problem(str(next(names, number)), prompt, truth, rest))

    def until_enough(rows: Iterable[tuple[str, Raw]]) -> Iterator[tuple[str, Raw]]:
        for one in rows:
            if part.limit is not None and len(found) >= part.limit:
                return
            yield one

    read_rows(until_enough(rows_of(source, benchmark.split)), read, f"{benchmark.name}: {source!r} has no rows")
    for reason, count in left_out.items():
        logger.warning("%s: %d problem%s left out: %s", benchmark.name, count, " is" if count == 1 else "s are", reason)
    if not found:
        raise UserError(f"{benchmark.name}: no problem of {source!r} is left; see what was left out above")
    partly = sum(problem.row.get("official_tests_complete") is False for problem in found)
    if partly:
        logger.warning("%s: of %d problems only a part of the official tests is there", benchmark.name, partly)
    ids = {problem.id for problem in found}
    if len(ids) != len(found):
        raise UserError(f"{benchmark.name}: {source!r} has rows with the same id; give each its own, or none any")
    return found


def _text(row: Row) -> str:
    for column in _TEXT_COLUMNS:
        value = row.get(column)
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):  # a user's message
            value = value[0].get("content")
        if isinstance(value, str) and value.strip():
            return value
    raise BadRow(
        f"there is no problem: one of the columns {', '.join(_TEXT_COLUMNS)} has to be text, or one message of a user"
    )


def _ground_truth(benchmark: Benchmark, row: Row) -> Any:
    if benchmark.grader != "code":
        return row["answer"]
    names = ("inputs", "outputs", "calls", "entry_point", "prompt", "test", "prelude")
    truth = {name: row[name] for name in names if row.get(name) is not None}
    if isinstance(row.get("tests"), str):
        truth["test"] = row["tests"]
    if "test" not in truth:
        truth.pop("prompt", None)
    return truth


def _template_of(truth: Any) -> str:
    return FUNCTION if "test" in truth else PROGRAM if "inputs" in truth else CALLED


__all__ = [
    "BENCHMARKS",
    "MATH_SIX",
    "WHOLE",
    "Benchmark",
    "Part",
    "Problem",
    "benchmark_of",
    "is_file",
    "own_benchmark",
    "read_problems",
]
