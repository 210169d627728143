"""Rows of published data sets, as they are on the Hugging Face hub, in this program's own forms.

    livecodebench   livecodebench/code_generation_lite and its copies: public and private tests, of either kind
    codeforces      open-r1/codeforces: the parts of a statement, official tests
    mathematics     a context before the question; final_answer as a list; GSM8K's answer behind its solution

A row that has none of a data set's columns is taken to be in our own form, and comes back as it is.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from typing import Any

from megatron_flowrl.data.rows import BadRow, Row


class LeftOut(Exception):
    """A problem that cannot be graded here, and why; not the fault of its row."""


def mathematics(row: Row) -> Row:
    """Raises BadRow where there is no answer."""
    answer = row.get("answer", row.get("final_answer", row.get("ground_truth")))
    if answer is None and isinstance(row.get("reward_model"), dict):  # as verl's files have it
        answer = row["reward_model"].get("ground_truth")
    if answer is None:
        raise BadRow("answer, final_answer, ground_truth and reward_model.ground_truth are missing, or null")
    if isinstance(answer, list):
        answer = answer[0] if len(answer) == 1 else ", ".join(map(str, answer))
    if isinstance(answer, str) and "####" in answer:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    context, question = row.get("context"), row.get("question")
    if isinstance(context, str) and context.strip() and isinstance(question, str):
        return {**row, "answer": answer, "question": f"{context.strip()}\n{question}"}
    return {**row, "answer": answer}


def livecodebench(row: Row) -> Row:
    """Tests by `testtype`: `stdin`, or `functional`, whose inputs are a line of JSON an argument.

    Private tests are JSON, or that pickled, compressed and in base64: of pickles only text is read, no object is made.

    Raises BadRow where the tests cannot be read.
    """
    if "question_content" not in row:
        return row
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    if not tests:
        raise BadRow("it has no tests")
    ours = {**row, "id": row.get("question_id", row.get("id")), "date": row.get("contest_date")}
    ours = {name: value for name, value in ours.items() if not name.endswith("_test_cases") and value is not None}
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
    """Statement from its parts; the official tests, or where there are none the examples.

    Raises LeftOut for problems that more than one output solves, that are interactive, or that read files.
    """
    if "description" not in row:
        return row
    if row.get("generated_checker"):
        raise LeftOut("more than one output is right, which takes a checker")
    if row.get("interaction_format"):
        raise LeftOut("it is interactive")
    if row.get("input_mode") not in (None, "stdio"):
        raise LeftOut("it reads and writes files")
    tests = row.get("official_tests") or row.get("examples")
    if not tests:
        raise LeftOut("it has no tests")
    parts = [f"{row.get('title') or ''}\n\n{row['description']}"]
    for title, column in (("Input", "input_format"), ("Output", "output_format")):
        if row.get(column):
            parts.append(f"{title}\n\n{row[column]}")
    for example in row.get("examples") or ():
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
        for test in tests:
            if not isinstance(test["input"], str) or not isinstance(test["output"], str):
                raise TypeError("input and output have to be text")
    except (ValueError, TypeError, KeyError, zlib.error, pickle.UnpicklingError, EOFError, IndexError) as error:
        raise BadRow(f"{column} cannot be read: {type(error).__name__}: {error}") from None
    return list(tests)


def _unpacked(content: str) -> str:
    found = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(content)))).load()
    if not isinstance(found, str):
        raise TypeError(f"a pickled {type(found).__name__}, not text")
    return found


class _TextOnly(pickle.Unpickler):
    """A pickle of text names no class; one that does is of something else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would make {module}.{name}, and text is all that is wanted")


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


__all__ = ["LeftOut", "codeforces", "livecodebench", "mathematics"]
