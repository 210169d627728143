"""The benchmarks by name, and problems from files.

A file is JSONL or Parquet, a row a problem, in one of these forms (other columns do no harm; `id` may be left out):

    {"problem": text, "answer": text}                                     mathematics; also "question", "prompt"
    {"prompt": code, "entry_point": name, "test": code}                   as HumanEval; also "tests"
    {"problem": text, "inputs": [text, ..], "outputs": [text, ..]}        programs that read and write
    {"problem": text, "entry_point": name, "calls": [{"args", "expected"}, ..]}

For CodeForces' rating also {"contest": name, "index": "A"}: which contest's file the problem is in, and where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.data.rows import BadRow, Row, read_rows, rows_of, short
from megatron_flowrl.rewards.find import check_ground_truth

MATH = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PROGRAM = (
    "{problem}\n\nWrite a Python program that reads from standard input and writes to standard output. Reason first; "
    "put the whole program in one block that begins with ```python at the end."
)
FUNCTION = (
    "Complete the Python function below. Reason first; put the whole function, with the imports that it needs, in one "
    "block that begins with ```python at the end.\n\n```python\n{problem}\n```"
)
_TEXT_COLUMNS = ("problem", "question", "prompt")


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked and graded. `hub`, `split`: the data set of the Hugging Face hub that stands for it."""

    name: str
    grader: str
    template: str
    hub: str | None = None
    split: str = "test"


BENCHMARKS: Mapping[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark("aime24", "math", MATH, "HuggingFaceH4/aime_2024", "train"),
        Benchmark("aime25", "math", MATH, "math-ai/aime25"),
        Benchmark("amc23", "math", MATH, "math-ai/amc23"),
        Benchmark("math500", "math", MATH, "HuggingFaceH4/MATH-500"),
        Benchmark("minerva", "math", MATH, "math-ai/minervamath"),
        Benchmark("olympiadbench", "math", MATH, "math-ai/olympiadbench"),
        Benchmark("gsm8k", "math", MATH),
        Benchmark("humaneval", "code", FUNCTION, "openai/openai_humaneval"),
        Benchmark("humaneval+", "code", FUNCTION, "evalplus/humanevalplus"),
        Benchmark("livecodebench", "code", PROGRAM),
        Benchmark("codeforces", "code", PROGRAM),
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


def benchmark_of(name: str) -> Benchmark:
    """Raises UserError for a name that is none."""
    if name not in BENCHMARKS:
        raise UserError(f"{name!r} is no benchmark; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_problems(benchmark: Benchmark, path: str | None, limit: int | None = None) -> list[Problem]:
    """From a file, or the hub. Raises UserError naming every bad row, or where there is no data to be had."""
    source = path or benchmark.hub
    if source is None:
        raise UserError(
            f"{benchmark.name} has no data set on the hub that can be read as it is: give a file with --data "
            f"{benchmark.name}=FILE; evaluation/benchmarks.py says what its rows are"
        )
    numbers = iter(range(2**62))

    def read(row: Row, place: str) -> Problem:
        number = next(numbers)
        truth = _ground_truth(benchmark, row)
        trouble = check_ground_truth(benchmark.grader, truth)
        if trouble is not None:
            raise BadRow(trouble)
        prompt = benchmark.template.format(problem=_text(row))
        return Problem(str(row.get("id", row.get("task_id", number))), prompt, truth, row)

    found = read_rows(rows_of(source, benchmark.split), read, f"{benchmark.name}: {source!r} has no rows", limit)
    ids = {problem.id for problem in found}
    if len(ids) != len(found):
        raise UserError(f"{benchmark.name}: {source!r} has rows with the same id; give each its own, or none any")
    return found


def _text(row: Row) -> str:
    for column in _TEXT_COLUMNS:
        if isinstance(row.get(column), str) and row[column].strip():
            return str(row[column])
    raise BadRow(f"there is no problem: one of the columns {', '.join(_TEXT_COLUMNS)} has to be text")


def _ground_truth(benchmark: Benchmark, row: Row) -> Any:
    if benchmark.grader == "code":
        names = {"inputs": "inputs", "outputs": "outputs", "calls": "calls", "entry_point": "entry_point"}
        names |= {"prompt": "prompt", "test": "test", "tests": "test"}
        truth = {inside: row[name] for name, inside in names.items() if row.get(name) is not None}
        if "test" not in truth:
            truth.pop("prompt", None)
        return truth
    if "answer" not in row:
        raise BadRow(f"there is no column answer; there are {short([*row])}")
    answer = row["answer"]
    if isinstance(answer, list) and len(answer) == 1:  # as some data sets of the hub have it
        answer = answer[0]
    if isinstance(answer, str) and "####" in answer:  # GSM8K's, behind its solution
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    return answer


__all__ = ["BENCHMARKS", "MATH_SIX", "Benchmark", "Problem", "benchmark_of", "read_problems"]
