"""What runs inside a jail, on either side of a test: the answer, or the test that calls it. Standard library only.

    python inside.py answer ENTRY        answer.py is there; a call comes as a line of JSON, and its result goes as one
    python inside.py test ENTRY          given.json is there; calls go out, results come in, and at last a verdict goes

The two never meet: `calls.py`, outside, passes lines from one to the other. So the answer's process sees arguments, and
nothing of what is expected; and the test's process sees plain data, and none of the answer's code.

    {"call": [arguments, keyword arguments]}   {"value": v, "arguments": [..]} or {"error": [type, text]}
    {"verdict": [passed, of, why not]} or {"broken": why the test could not be run}
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

try:
    from plain import decode, encode, same_value  # type: ignore[import-not-found]  # in a jail
except ImportError:
    from megatron_flowrl.rewards.sandbox.plain import decode, encode, same_value

_LONGEST_TEXT = 2000


def main(side: str, entry: str) -> None:
    """What the module says."""
    channel = _private_channel()
    if side == "answer":
        _answer(channel, entry)
    else:
        _test(channel, entry)


def _private_channel() -> tuple[TextIO, TextIO]:
    """Standard input and output for the messages alone: what the code prints goes nowhere."""
    given, said = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    return given, said


def _send(channel: tuple[TextIO, TextIO], message: Any) -> None:
    channel[1].write(json.dumps(message) + "\n")
    channel[1].flush()


def _error(error: BaseException) -> dict[str, list[str]]:
    try:
        text = str(error)
    except Exception:
        text = ""
    return {"error": [type(error).__name__, text[:_LONGEST_TEXT]]}


def _answer(channel: tuple[TextIO, TextIO], entry: str) -> None:
    module = types.ModuleType("answer")  # not __main__: what a program does when it is run is not asked for
    sys.modules["answer"] = module
    failed = None
    try:
        with open("answer.py", encoding="utf-8", errors="surrogatepass") as file:
            exec(compile(file.read(), "answer.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        failed = _error(error)
    for line in channel[0]:
        if failed is not None:
            _send(channel, failed)
            continue
        try:
            arguments, keywords = decode(json.loads(line)["call"])
            value = _function(module, entry)(*arguments, **keywords)
            reply = {"value": encode(value), "arguments": encode(arguments)}
        except BaseException as error:
            reply = _error(error)
        _send(channel, reply)


def _function(module: types.ModuleType, entry: str) -> Callable[..., Any]:
    """`f`, or `Solution.f` of a new Solution."""
    owner, _, name = entry.rpartition(".")
    found: Callable[..., Any] = getattr(getattr(module, owner)() if owner else module, name)
    return found


def _test(channel: tuple[TextIO, TextIO], entry: str) -> None:
    called = []

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        called.append(True)
        _send(channel, {"call": encode([list(arguments), keywords])})
        reply = json.loads(channel[0].readline())
        if "error" in reply:
            kind, text = reply["error"]
            known = getattr(builtins, str(kind), None)
            is_error = isinstance(known, type) and issubclass(known, Exception)
            raise known(str(text)) if is_error and known is not None else RuntimeError(str(text))
        for mine, theirs in zip(arguments, decode(reply["arguments"]), strict=True):
            _write_back(mine, theirs)
        return decode(reply["value"])

    with open("given.json", encoding="utf-8") as file:
        given = json.load(file)
    passed, why = 0, ""
    total = len(given["calls"]) if "calls" in given else 1
    if "calls" in given:
        for number, call in enumerate(given["calls"]):
            try:
                right = same_value(candidate(*decode(call["args"])), decode(call["expected"]))
            except Exception as error:
                right, why = False, why or f"call {number}: {type(error).__name__}: {error}"
            passed += right
            why = why or ("" if right else f"call {number}: another value than expected")
    else:
        space: dict[str, Any] = {"__name__": "test"}
        try:
            exec(compile(given["prompt"], "prompt", "exec", dont_inherit=True), space)
            space[entry] = candidate
            exec(compile(given["test"], "test", "exec", dont_inherit=True), space)
            if "check" in space:
                space["check"](candidate)
            passed = 1
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            if not called:  # it misses something of its own, and says nothing about the answer
                _send(channel, {"broken": why[:_LONGEST_TEXT]})
                return
    _send(channel, {"verdict": [passed, total, why[:_LONGEST_TEXT]]})


def _write_back(mine: Any, theirs: Any) -> None:
    """What the answer has changed of an argument, a test may look at."""
    if type(mine) is type(theirs) is list:
        mine[:] = theirs
    elif type(mine) is type(theirs) in (dict, set):
        mine.clear()
        mine.update(theirs)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
