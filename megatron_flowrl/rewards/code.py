"""`code`: whether the Python in a response passes the tests of its problem, run in a jail (`sandbox/`).

Ground truth, a mapping or its JSON, is one of

    {"inputs": ["3 4\\n", ..], "outputs": ["7\\n", ..]}                      standard input and output
    {"entry_point": "add", "calls": [{"args": [3, 4], "expected": 7}, ..]}  calls; Solution.add is called on Solution()
    {"entry_point": "add", "prompt": code, "test": code}                    as HumanEval: check(add), or assertions

"prelude", text, may stand beside them: it goes before the program.

The program is the last fenced block of a response that is Python's or nobody's, to the end where it is not closed; a
response without a fence is the program. HumanEval's prompt goes before it: so it may go on from there, or define the
function again. The score is 1 where all tests are passed, else 0, or with reward.code.score=fraction the share of those
that are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_flowrl.config.errors import UserError
from megatron_flowrl.rewards.grader import Grade, Grader, Item, shown
from megatron_flowrl.rewards.sandbox.library import Library, library_of
from megatron_flowrl.rewards.sandbox.run import PYTHON, Jail, JailBroken, Limits
from megatron_flowrl.rewards.sandbox.server import by_server
from megatron_flowrl.rewards.sandbox.tests import Verdict, by_calls, by_output
from megatron_flowrl.rewards.sandbox.walls import checked_walls

if TYPE_CHECKING:
    from megatron_flowrl.config import CodeConfig, RewardConfig

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n?", re.MULTILINE)
_START_SECONDS = 1.0  # of a jail, and for its end
_PYTHON = ("", "python", "py", "python3")


def make(settings: RewardConfig) -> Grader:
    """The grader.

    Raises UserError where a folder or package is none, or programs cannot be run safely and nobody said that they may.
    """
    code = settings.code
    limits = Limits(
        cpu_seconds=code.cpu_seconds,
        wall_seconds=code.wall_seconds,
        memory_bytes=code.memory_mib * 2**20,
        processes=code.processes,
    )
    if settings.timeout_seconds < code.wall_seconds + _START_SECONDS:
        raise UserError(
            f"reward.timeout_seconds = {settings.timeout_seconds:g} is for all tests of an answer, and "
            f"reward.code.wall_seconds = {code.wall_seconds:g} for one of them: raise the former, or lower the latter"
        )
    namespaces = code.server is None and checked_walls(code.unprotected).namespaces
    library = Library() if code.server is not None else _library(code, limits, namespaces)
    seconds = settings.timeout_seconds - code.wall_seconds - _START_SECONDS  # what a last test may still begin in

    def grade(items: Sequence[Item]) -> list[Grade]:
        return [Grade(score_of(verdict_of(item), code.score)) for item in items]

    def verdict_of(item: Item) -> Verdict:
        problem, program = problem_of(item.ground_truth), program_of(item.response)
        if "from __future__" not in program:
            before = [str(problem[name]) for name in ("prelude", "prompt") if name in problem]
            program = "\n".join([*before, program])
        if code.server is not None:
            return by_server(code.server, program, problem, limits)
        if "inputs" in problem:
            tests = list(zip(problem["inputs"], problem["outputs"], strict=True))
            return by_output(
                program,
                tests,
                limits,
                namespaces=namespaces,
                library=library,
                seconds=seconds,
                to_the_end=code.score == "fraction",
            )
        given: dict[str, Any] = {name: problem[name] for name in ("calls", "prompt", "test") if name in problem}
        entry = problem["entry_point"]
        return by_calls(program, given, entry, limits, namespaces=namespaces, library=library, seconds=seconds)

    return grade


def _library(code: CodeConfig, limits: Limits, namespaces: bool) -> Library:
    """Of the settings; that the packages can be imported there is tried. Raises UserError."""
    try:
        library = library_of(code.readable, code.packages, namespaces=namespaces)
        if code.packages:
            command = [PYTHON, "-s", "-c", f"import {', '.join(code.packages)}"]
            with Jail(command, {}, limits, namespaces=namespaces, library=library) as jail:
                outcome = jail.run()
            if outcome.code != 0:
                said = outcome.errors.decode(errors="replace").strip().rpartition("\n")[2]
                raise ValueError(f"{', '.join(code.packages)} cannot be imported in a jail: {outcome.reason or said}")
    except (ValueError, JailBroken) as error:
        raise UserError(f"reward.code.readable or reward.code.packages: {error}") from error
    return library


def check_ground_truth(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a ground truth, or None."""
    try:
        problem_of(ground_truth)
    except ValueError as error:
        return str(error)
    return None


def problem_of(ground_truth: Any) -> dict[str, Any]:
    """The tests, in one of the three forms. Raises ValueError."""
    if isinstance(ground_truth, str):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError as error:
            raise ValueError(f"the ground truth {shown(ground_truth)} is no JSON: {error}") from error
    problem = dict(ground_truth) if isinstance(ground_truth, Mapping) else {}
    if "inputs" in problem or "outputs" in problem:
        sides = [problem.get(name) for name in ("inputs", "outputs")]
        good = all(_is_list(side, str) for side in sides) and len(sides[0]) == len(sides[1])  # type: ignore[arg-type]
    else:
        good = isinstance(problem.get("entry_point"), str) and (
            (_is_list(problem.get("calls"), Mapping) and all({"args", "expected"} <= {*c} for c in problem["calls"]))
            or all(isinstance(problem.get(name), str) for name in ("prompt", "test"))
        )
    if not good:
        raise ValueError(
            f"the ground truth {shown(ground_truth)} has no tests; give inputs and outputs (as many texts each), or "
            "entry_point with calls (args, expected) or with prompt and test"
        )
    return problem


def program_of(response: str) -> str:
    """The program in a response, as the module says."""
    program, start, fence, language = None, 0, "", ""
    for match in _FENCE.finditer(response):
        if not fence:
            fence, language, start = match[1], match[2].lower(), match.end()
        elif match[1].startswith(fence) and not match[2]:
            if language in _PYTHON:
                program = response[start : match.start()]
            fence = ""
    if fence and language in _PYTHON:
        program = response[start:]
    return response if program is None else program


def score_of(verdict: Verdict, how: str) -> float:
    """What it is worth to have passed so many tests."""
    return verdict.passed / verdict.of if how == "fraction" and verdict.of else float(verdict.passed == verdict.of)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, kind) for one in value)


__all__ = ["check_ground_truth", "make", "problem_of", "program_of", "score_of"]
