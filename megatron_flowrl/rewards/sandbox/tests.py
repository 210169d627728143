"""Programs against tests: by standard input and output, or by calls of a function."""

from __future__ import annotations

import json
import math
import os
import select
import selectors
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_flowrl.rewards.sandbox.library import Library
from megatron_flowrl.rewards.sandbox.plain import encode, same_value
from megatron_flowrl.rewards.sandbox.run import PYTHON, Jail, JailBroken, Limits

HERE = Path(__file__).parent
_INSIDE = {"inside.py": "inside.py", "plain.py": "plain.py"}
_LONGEST_LINE = 2**24
_CHUNK = 2**16
_NOTHING = Library()


@dataclass(frozen=True)
class Verdict:
    """How many tests of how many were passed, and of the first that was not, why."""

    passed: int
    of: int
    why: str = ""


def by_output(
    program: str,
    tests: Sequence[tuple[str, str]],
    limits: Limits,
    *,
    namespaces: bool,
    library: Library = _NOTHING,
    seconds: float = math.inf,
    to_the_end: bool = True,
) -> Verdict:
    """Run the program on each (input, output), each time anew; without `to_the_end`, to the first that fails.

    After `seconds` no test is begun, and those that are left are not passed. Raises JailBroken.

    Lines count without spaces at their ends and empty lines at the end of all, and as the same where they differ only
    in how numbers of the same value are written. What is expected stays in this process.
    """
    passed, why, began = 0, "", time.monotonic()
    for number, (given, expected) in enumerate(tests):
        if time.monotonic() - began > seconds:
            return Verdict(passed, len(tests), why or f"test {number}: time limit of all tests")
        with Jail(_python("answer.py"), {"answer.py": program}, limits, namespaces=namespaces, library=library) as jail:
            outcome = jail.run(given.encode("utf-8", "surrogatepass"))
        problem = outcome.reason
        if not problem and outcome.code != 0:
            last = outcome.errors.decode(errors="replace").strip().rpartition("\n")[2]
            problem = f"exit status {outcome.code}: {last[-200:]}"
        if not problem and not same_output(outcome.output.decode(errors="replace"), expected):
            problem = "another output than expected"
        passed += not problem
        why = why or (f"test {number}: {problem}" if problem else "")
        if problem and not to_the_end:
            break
    return Verdict(passed, len(tests), why)


def by_calls(
    program: str,
    given: Mapping[str, Any],
    entry: str,
    limits: Limits,
    *,
    namespaces: bool,
    library: Library = _NOTHING,
    seconds: float = math.inf,
) -> Verdict:
    """Call `entry` of the program, `f` or `Class.f`, from a test in a jail of its own. Raises JailBroken.

    given is {"calls": [{"args": [..], "expected": v}, ..]}, or {"prompt": code, "test": code} where test has
    assertions, or a function `check` that is given the function to be tested. The limits are those of a call, or of
    such a test as a whole; all calls together may take `seconds` and what one may take.
    """
    count = len(given.get("calls", "x"))
    together = min(count * limits.wall_seconds, seconds + limits.wall_seconds)
    of_all = replace(limits, cpu_seconds=count * limits.cpu_seconds, wall_seconds=together)
    inside = {name: (HERE / file).read_text() for name, file in _INSIDE.items()}
    of_test = {**inside, "given.json": json.dumps(_encoded(given))}
    with (
        Jail(
            _python("inside.py", "answer", entry),
            {**inside, "answer.py": program},
            of_all,
            namespaces=namespaces,
            library=library,
        ) as answer,
        Jail(
            _python("inside.py", "test", entry),
            of_test,
            replace(of_all, wall_seconds=together + 2),
            namespaces=namespaces,
            library=library,
        ) as test,
    ):
        deadline = time.monotonic() + together + 1
        asking, asked = _Lines(test, deadline), _Lines(answer, deadline)
        gone = ""
        while True:
            line = asking.read()
            if line is None:
                return Verdict(0, count, gone or _end_of(test, deadline))
            message = _message(line)
            if "broken" in message:
                raise JailBroken(f"the test cannot be run: {message['broken']}")
            if "verdict" in message:
                passed, of, why = message["verdict"]
                return Verdict(int(passed), int(of), gone or str(why))
            until = min(deadline, time.monotonic() + limits.wall_seconds + 1)
            reply = asked.ask(line, until) if not gone else None
            if reply is None:
                gone = gone or f"the answer's process: {_end_of(answer, until)}"
                reply = json.dumps({"error": ["RuntimeError", gone]}).encode() + b"\n"
            if not asking.write(reply):
                return Verdict(0, count, gone or _end_of(test, deadline))


def _encoded(given: Mapping[str, Any]) -> dict[str, Any]:
    if "calls" not in given:
        return dict(given)
    calls = [{"args": encode(list(call["args"])), "expected": encode(call["expected"])} for call in given["calls"]]
    return {"calls": calls}


def _end_of(jail: Jail, deadline: float) -> str:
    """Why a process says no more. Raises JailBroken where it never was one: the answer is not to blame for that."""
    assert jail.process.stdout
    descriptor = jail.process.stdout.fileno()
    if time.monotonic() > deadline:
        return "time limit"
    if not select.select([descriptor], [], [], 0)[0] or os.read(descriptor, 1):
        return "it said too much"
    code, reason = jail.report()
    return reason or f"exit status {code}"


def same_output(found: str, expected: str) -> bool:
    """As `by_output` says."""
    ours, theirs = (
        [line.rstrip() for line in text.replace("\r\n", "\n").rstrip().split("\n")] for text in (found, expected)
    )
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    ours, theirs = a.split(), b.split()
    if len(ours) != len(theirs):
        return False
    try:
        return all(one == other or Decimal(one) == Decimal(other) for one, other in zip(ours, theirs, strict=True))
    except InvalidOperation:
        return False


def _python(*arguments: str) -> list[str]:
    return [PYTHON, "-s", *arguments]  # not -I: what stands beside a program is imported; not -S: it brings exit()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise JailBroken(f"the test's process wrote {line[:80]!r}")
    return message


class _Lines:
    """Lines from and to a jail, until a deadline."""

    def __init__(self, jail: Jail, deadline: float) -> None:
        assert jail.process.stdin and jail.process.stdout
        self._input, self._output = jail.process.stdin.fileno(), jail.process.stdout.fileno()
        self._deadline, self._received = deadline, bytearray()
        os.set_blocking(self._input, False)

    def ask(self, line: bytes, deadline: float) -> bytes | None:
        """A line to it, and one from it, by another deadline; None where there is none."""
        self._deadline = deadline
        return self.read() if self.write(line) else None

    def write(self, line: bytes) -> bool:
        """Whether it took it."""
        left = memoryview(line)
        while left:
            if not self._wait(self._input, selectors.EVENT_WRITE):
                return False
            try:
                left = left[os.write(self._input, left[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError:
                return False
        return True

    def read(self) -> bytes | None:
        """None where there is none in time, or it has ended, or says too much."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > _LONGEST_LINE or not self._wait(self._output, selectors.EVENT_READ):
                return None
            chunk = os.read(self._output, _CHUNK)
            if not chunk:
                return None
            self._received += chunk
        line = bytes(self._received[: end + 1])
        del self._received[: end + 1]
        return line

    def _wait(self, descriptor: int, event: int) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            return bool(selector.select(max(self._deadline - time.monotonic(), 0.0)))


__all__ = ["HERE", "Verdict", "by_calls", "by_output", "same_output", "same_value"]
