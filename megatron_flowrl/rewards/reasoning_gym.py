"""Tasks of reasoning-gym, each scored by its own score_answer.

Ground truth: {"dataset": name, "entry": {"question": ..., "answer": ..., "metadata": {...}}}, as an object or as its
JSON text; or else the columns of the row that reasoning-gym itself uses, `question`, `answer` and `metadata` (an object
or its JSON text), with the name as `metadata.source_dataset` or in a column `dataset`.

The answer is what stands in the last <answer></answer>; where there is none, all after the last `Answer:`; where there
is none either, the whole response. The score is the task's: between 0 and 1, with a little for trying in many tasks, so
that `reward.binary` is what makes it right or wrong. The key is the answer, its white space reduced.

Some of its tasks (countdown, puzzle24, simple_integration and others) hand the answer to sympy's parser, which
evaluates it as Python: that runs, unconfined, in the grading process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_flowrl.rewards.answer import marked_answer, tagged_answer
from megatron_flowrl.rewards.grader import Grade, Grader, Item, import_library, shown

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig

Score = Callable[[str, Mapping[str, Any]], float]


def make(settings: RewardConfig) -> Grader:
    """The grader. Raises UserError where reasoning-gym is not installed."""
    library = import_library("reasoning_gym", "reasoning_gym", "reasoning-gym", "reasoning-gym")
    task = cache(lambda name: _task(library, name))

    def grade(items: Sequence[Item]) -> list[Grade]:
        return [_grade(task, item) for item in items]

    return grade


def check_ground_truth(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a ground truth, or None. Without the row, which may have it all, not much can be."""
    if row is None and not _is_object(ground_truth):
        return None
    try:
        _entry(ground_truth, row or {})
    except ValueError as error:
        return str(error)
    return None


def final_answer(response: str) -> str:
    """The text that is read as the answer, as the module says."""
    for answer in (tagged_answer(response), marked_answer(response)):
        if answer is not None:
            return answer
    return response.strip()


def _task(library: ModuleType, name: str) -> Score:
    known = library.factory.DATASETS
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reasoning-gym has no task {name!r}{hint}")
    score: Score = library.get_score_answer_fn(name)
    return score


def _grade(task: Callable[[str], Score], item: Item) -> Grade:
    name, entry = _entry(item.ground_truth, item.row)
    answer = final_answer(item.response)
    return Grade(task(name)(answer, entry), " ".join(answer.split()) or None)


def _entry(ground_truth: Any, row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name of the task, and its entry. Raises ValueError where there is none."""
    given = _object(ground_truth) if _is_object(ground_truth) else row
    entry = _object(given["entry"]) if "entry" in given else dict(given)
    if "answer" not in entry or "metadata" not in entry:
        raise ValueError(
            f"{shown(ground_truth)} and the row's columns ({', '.join(row) or 'none'}) have no entry of reasoning-gym; "
            'give {"dataset": name, "entry": {...}}, or columns question, answer and metadata'
        )
    entry["metadata"] = _object(entry["metadata"])
    if isinstance(entry["metadata"].get("output"), list):
        entry["metadata"]["output"] = _tuples(entry["metadata"]["output"])
    name = given.get("dataset", entry["metadata"].get("source_dataset"))
    if not isinstance(name, str):
        raise ValueError(f"the entry {shown(entry)} names no task; give metadata.source_dataset, or a column dataset")
    return name, entry


def _tuples(value: Any) -> Any:
    """Grids of arc_agi and rearc as those compare them: JSON and Parquet have lists only."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith('{"'))


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{shown(value)} is no JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{shown(value)} is no object")
    return dict(value)


__all__ = ["check_ground_truth", "final_answer", "make"]
