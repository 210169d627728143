"""Rows of published data sets, as they are on the Hugging Face hub, in this program's own forms.

    livecodebench   livecodebench/code_generation_lite and its copies: public and private tests, of either kind
    codeforces      open-r1/codeforces: the parts of a statement, official tests
    mathematics     a context before the question; final_answer as a list; GSM8K's answer behind its solution

A row that has none of a data set's columns is taken to be in our own form, and comes back as it is.
"""

from __future__ import annotations

import base64
import datetime
import json
import pickletools
import re
import zlib
from collections.abc import Mapping
from typing import Any

from megatron_flowrl.data.rows import BadRow, Row, short

_LARGEST = 2**30  # bytes of a problem's tests
_TEXT_OPERATIONS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_OTHER_OPERATIONS = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")


class LeftOut(Exception):
    """A problem that cannot be graded here, and why; not the fault of its row."""


def mathematics(row: Row) -> Row:
    """Raises BadRow where there is no answer."""
    answer = answer_of(row)
    if isinstance(answer, list):
        answer = answer[0] if len(answer) == 1 else ", ".join(map(str, answer))
    if isinstance(answer, str) and "####" in answer:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    context, question = row.get("context"), row.get("question")
    if isinstance(context, str) and context.strip() and isinstance(question, str):
        return {**row, "answer": answer, "question": f"{context.strip()}\n{question}"}
    return {**row, "answer": answer}


def answered(row: Row) -> Row:
    """The answer as it is, for any grader. Raises BadRow where there is none."""
    return {**row, "answer": answer_of(row)}


def answer_of(row: Row) -> Any:
    """The first that there is of the columns for it. Raises BadRow."""
    verl = row.get("reward_model")
    inside = verl.get("ground_truth") if isinstance(verl, Mapping) else None
    for answer in (row.get("answer"), row.get("final_answer"), row.get("ground_truth"), inside):
        if answer is not None:
            return answer
    raise BadRow("answer, final_answer, ground_truth and reward_model.ground_truth are missing, or null")


def programs(row: Row) -> Row:
    """Of whichever data set the row is; tests may also be in reward_model.ground_truth. Raises BadRow and LeftOut."""
    if "question_content" in row:
        return livecodebench(row)
    if "description" in row and "inputs" not in row:
        return codeforces(row)
    if any(row.get(name) is not None for name in ("inputs", "calls", "test", "tests")):
        return row
    tests = answer_of(row)
    try:
        tests = json.loads(tests) if isinstance(tests, str) else tests
    except ValueError:
        raise BadRow("it has no tests, and its ground truth is no JSON") from None
    if not isinstance(tests, Mapping):
        raise BadRow("it has no tests: inputs and outputs, calls, or test")
    return {**row, **tests}


def date_of(row: Row) -> str | None:
    """As 2024-08-31: of a column date or contest_date, or the seconds of contest_start. Raises BadRow."""
    for column in ("date", "contest_date", "contest_start"):
        value = row.get(column)
        if isinstance(value, datetime.date):
            return value.isoformat()[:10]
        if column == "contest_start" and isinstance(value, int):
            return datetime.datetime.fromtimestamp(value, datetime.UTC).isoformat()[:10]
        if isinstance(value, str) and re.match(r"\d{4}-\d{2}-\d{2}(?!\d)", value):
            return value[:10]
        if value is not None:
            raise BadRow(f"its {column} is {short(value)}, which is no date such as 2024-08-31")
    return None


# What LiveCodeBench's own harness imports before a program, as far as it matters: models count on it.
_PRELUDE = """import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math
import operator, random, re, statistics, string, sys
from bisect import *
from collections import *
from copy import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from random import *
from typing import *
from builtins import *
"""


def livecodebench(row: Row) -> Row:
    """Tests by `testtype`: `stdin`, or `functional`, whose inputs are a line of JSON an argument.

    Private tests are JSON, or that pickled, compressed and in base64: of pickles only a text is read.

    Raises BadRow where the tests cannot be read.
    """
    if "question_content" not in row:
        return row
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    if not tests:
        raise BadRow("it has no tests")
    ours = {name: value for name, value in row.items() if not name.endswith("_test_cases")}
    ours |= {"id": row.get("question_id", row.get("id")), "prelude": _PRELUDE}
    kinds = {test.get("testtype") for test in tests}
    if kinds == {"functional"}:
        starter = str(row.get("starter_code") or "")
        ours["problem"] = f"{row['question_content']}\n\nIt starts like this:\n\n```python\n{starter}\n```"
        ours["entry_point"] = f"Solution.{_function_name(row)}"
        ours["calls"] = [
            {"args": [_json(line) for line in test["input"].splitlines()], "expected": _json(test["output"])}
            for test in tests
        ]
    elif kinds == {"stdin"}:
        ours["problem"] = row["question_content"]
        ours["inputs"] = [test["input"] for test in tests]
        ours["outputs"] = [test["output"] for test in tests]
    else:
        raise BadRow(f"its tests are of the kinds {', '.join(sorted(map(str, kinds)))}; known are stdin and functional")
    return ours


def codeforces(row: Row) -> Row:
    """Statement from its parts, and the official tests.

    Raises LeftOut for problems that more than one output solves, that are interactive, that read files, or that come
    without official tests: the examples are in the statement. Raises BadRow.
    """
    if "description" not in row or "inputs" in row:
        return row
    if row.get("generated_checker"):
        raise LeftOut("more than one output is right, which takes a checker")
    if row.get("interaction_format"):
        raise LeftOut("it is interactive")
    if row.get("input_mode") not in (None, "stdio"):
        raise LeftOut("it reads and writes files")
    tests = _tests(row, "official_tests")
    if not tests:
        raise LeftOut("it has no official tests")
    parts = [f"{row.get('title') or ''}\n\n{row['description']}"]
    for title, column in (("Input", "input_format"), ("Output", "output_format")):
        if row.get(column):
            parts.append(f"{title}\n\n{row[column]}")
    for example in _tests(row, "examples"):
        parts.append(f"Example\n\nInput:\n{example['input'].rstrip()}\n\nOutput:\n{example['output'].rstrip()}")
    if row.get("note"):
        parts.append(f"Note\n\n{row['note']}")
    ours = {name: value for name, value in row.items() if name != "official_tests"}
    ours |= {"problem": "\n\n".join(parts).strip(), "inputs": [test["input"] for test in tests]}
    ours |= {"outputs": [test["output"] for test in tests]}
    if row.get("contest_id") is not None:
        ours["contest"] = row["contest_id"]
    return ours


def _tests(row: Row, column: str) -> list[dict[str, Any]]:
    content = row.get(column)
    if not content:
        return []
    try:
        tests = content
        if isinstance(content, str):
            tests = json.loads(content if content.lstrip().startswith("[") else _unpacked(content))
        if not isinstance(tests, list):
            raise TypeError("no list of tests")
        for test in tests:
            if not isinstance(test["input"], str) or not isinstance(test["output"], str):
                raise TypeError("input and output have to be text")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, zlib.error) as error:
        raise BadRow(f"{column} cannot be read: {type(error).__name__}: {error}") from None
    return list(tests)


def _unpacked(content: str) -> str:
    """The text in a pickle that has a text and nothing else, read without running the pickle. Raises ValueError."""
    unpacking = zlib.decompressobj()
    pickled = unpacking.decompress(base64.b64decode(content), _LARGEST)
    if unpacking.unconsumed_tail:
        raise ValueError(f"more than {_LARGEST} bytes")
    texts = []
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in _TEXT_OPERATIONS:
            texts.append(str(argument))
        elif operation.name not in _OTHER_OPERATIONS:
            raise ValueError(f"a pickle with {operation.name}, where text is all that is wanted")
    if len(texts) != 1:
        raise ValueError(f"a pickle of {len(texts)} texts, where one is wanted")
    return texts[0]


def _function_name(row: Row) -> str:
    metadata = row.get("metadata")
    try:
        known = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        known = None
    name = known.get("func_name") if isinstance(known, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRow("its tests call a function, and metadata has no func_name")
    return name


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise BadRow(f"a test has {text[:80]!r}, which is no JSON") from None


__all__ = [
    "LeftOut",
    "answer_of",
    "answered",
    "codeforces",
    "date_of",
    "livecodebench",
    "mathematics",
    "programs",
]
