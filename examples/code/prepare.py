"""Training data of the paper's runs in code: DeepCoder's problems with their tests, in the form of the grader `code`.

  python -m examples.code.prepare data/code/train.jsonl taco primeintellect lcbv5   # folders of Parquet files
  python -m examples.code.prepare data/code/held_out.jsonl lcbv5/test-00000-of-00008.parquet --limit 100
  python -m examples.code.prepare data/code/train.jsonl agentica-org/DeepCoder-Preview-Dataset:taco  # from the hub

Rows are {"problem": text, "tests": JSON, "starter_code", "metadata"}, with tests in one of the forms of its parts:

  taco            {"inputs": [...], "outputs": [...], "fn_name": name or nothing}
  primeintellect  [{"input", "output", "type": "stdin_stdout" or "function_call", "fn_name"}, ...]
  lcbv5           [{"input", "output", "testtype": "stdin" or "functional", "metadata": {"func_name"}}, ...]
  codeforces      [{"input", "output"}, ...]

A function's expected value that comes in a list of its own (taco, primeintellect) is taken out of it. Of more than
--most-tests tests those with the longest inputs are kept, as DeepCoder's own harness does.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from examples.public_rows import formed, run, told, write_jsonl
from megatron_flowrl.data.rows import BadRow, Row, short
from megatron_flowrl.evaluation.benchmarks import CALLED, PROGRAM
from megatron_flowrl.evaluation.published import LeftOut

NO_TESTS = "it has no tests"
REPEATED = "it was there before"
_PROGRAM_KINDS = (None, "", "stdin", "stdin_stdout")
_FUNCTION_KINDS = ("functional", "function_call")
_Test = dict[str, Any]


def prepare(
    file: Path, sources: Sequence[str], split: str, most: int, limit: int | None, leave_out_bad_rows: bool
) -> None:
    """Write the file. Raises UserError."""
    left_out: Counter[str] = Counter()
    rows = formed(sources, split, partial(code_row, most=most), left_out, leave_out_bad_rows=leave_out_bad_rows)
    once = {str(row["prompt"]): row for row in reversed(rows)}
    left_out[REPEATED] += len(rows) - len(once)
    kept = list(islice((row for row in rows if once.get(str(row["prompt"])) is row), limit))
    write_jsonl(file, kept)
    called = sum("calls" in row["ground_truth"] for row in kept)
    print(f"{file}: {len(kept)} problems, of which {called} ask for a function; {told(+left_out)}")


def code_row(row: Row, most: int) -> dict[str, Any]:
    """{"prompt", "ground_truth"}. Raises BadRow, and LeftOut for a problem without tests."""
    problem = row.get("problem") or row.get("question")
    if not isinstance(problem, str) or not problem.strip():
        raise BadRow(f"problem = {short(problem)} is no text")
    tests = _tests(row)
    if not tests:
        raise LeftOut(NO_TESTS)
    longest = sorted(range(len(tests)), key=lambda i: len(str(tests[i]["input"])), reverse=True)[:most]
    tests = [tests[i] for i in sorted(longest)]
    kinds = {test["function"] for test in tests}
    if len(kinds) > 1:
        raise BadRow(f"its tests are for {', '.join(sorted(map(str, kinds)))}: one function, or none, is wanted")
    (function,) = kinds
    starter = row.get("starter_code")
    starter = starter if isinstance(starter, str) and starter.strip() else None
    if function is None:
        truth: dict[str, Any] = {"inputs": [_text(test, "input") for test in tests]}
        truth["outputs"] = [_text(test, "output") for test in tests]
        return {"prompt": PROGRAM.replace("{problem}", problem.strip()), "ground_truth": truth}
    if starter is not None:
        problem = f"{problem.strip()}\n\nIt starts like this:\n\n```python\n{starter.rstrip()}\n```"
    else:
        problem = f"{problem.strip()}\n\nThe function's name is `{function}`."
    method = starter is not None and "class Solution" in starter
    calls = [{"args": test["input"], "expected": test["output"]} for test in tests]
    truth = {"entry_point": f"Solution.{function}" if method else function, "calls": calls}
    return {"prompt": CALLED.replace("{problem}", problem), "ground_truth": truth}


def _tests(row: Row) -> list[_Test]:
    """{"input", "output", "function"} of each: texts, or a function's arguments and its value. Raises BadRow."""
    tests = _parsed(row.get("tests"), "tests")
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise BadRow("tests has no inputs and outputs, as many of each")
        name = tests.get("fn_name")
        kind = "function_call" if name else None
        tests = [
            {"input": one, "output": other, "type": kind, "fn_name": name}
            for one, other in zip(inputs, outputs, strict=True)
        ]
    if not isinstance(tests, list):
        raise BadRow(f"tests = {short(tests)} is neither a list nor inputs and outputs")
    return [_test(test, row, f"tests[{place}]") for place, test in enumerate(tests)]


def _test(test: Any, row: Row, where: str) -> _Test:
    if not isinstance(test, Mapping) or not {"input", "output"} <= {*test}:
        raise BadRow(f"{where} = {short(test)} has no input and output")
    kind = test.get("testtype") or test.get("type")
    if kind in _PROGRAM_KINDS:
        return {"input": test["input"], "output": test["output"], "function": None}
    if kind not in _FUNCTION_KINDS:
        known = ", ".join(filter(None, (*_PROGRAM_KINDS, *_FUNCTION_KINDS)))
        raise BadRow(f"{where} is of the kind {short(kind)}; known are {known}")
    function = test.get("fn_name") or _name(test.get("metadata")) or _name(row.get("metadata"))
    if not isinstance(function, str) or not function.isidentifier():
        raise BadRow(f"{where} calls a function, and has no name for it")
    if kind == "functional":  # a line of JSON an argument
        arguments = [_parsed(line, f"{where}.input") for line in _text(test, "input", where).splitlines()]
        expected = _parsed(test["output"], f"{where}.output")
        return {"input": arguments, "output": expected, "function": function}
    arguments, expected = _parsed(test["input"], f"{where}.input"), _parsed(test["output"], f"{where}.output")
    if not isinstance(arguments, list):
        raise BadRow(f"{where}.input = {short(arguments)} is no list of arguments")
    if isinstance(expected, list) and len(expected) == 1:
        (expected,) = expected
    return {"input": arguments, "output": expected, "function": function}


def _text(test: Mapping[str, Any], name: str, where: str = "a test") -> str:
    value = test[name]
    if isinstance(value, list) and all(isinstance(line, str) for line in value):  # as lines
        value = "\n".join(line.rstrip("\n") for line in value)
    if not isinstance(value, str):
        raise BadRow(f"{where}: {name} = {short(value)} is no text")
    return value


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where} = {short(value)} is no JSON ({error})") from None


def _name(metadata: Any) -> Any:
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        return None
    return metadata.get("func_name") if isinstance(metadata, Mapping) else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSONL to write")
    parser.add_argument("sources", nargs="+", metavar="FILE|FOLDER|NAME")
    parser.add_argument("--split", default="train", help="of a data set of the hub (default: train)")
    parser.add_argument("--most-tests", type=int, default=15, help="of a problem (default: 15)")
    parser.add_argument("--limit", type=int, help="problems to write, from the first (default: all)")
    parser.add_argument("--leave-out-bad-rows", action="store_true", help="count them, and go on")
    given = parser.parse_args(arguments)
    if given.most_tests < 1 or (given.limit is not None and given.limit < 1):
        parser.error("--most-tests and --limit: one at least")
    run(
        lambda: prepare(given.file, given.sources, given.split, given.most_tests, given.limit, given.leave_out_bad_rows)
    )


if __name__ == "__main__":
    main()
