"""Programs against tests on a server that speaks SandboxFusion's `/run_code`.

What is expected does not go there: it is compared here. So tests that are themselves programs, as HumanEval's, cannot
be run this way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_flowrl.rewards.remote import post
from megatron_flowrl.rewards.sandbox.plain import NotPlain, decode, encode
from megatron_flowrl.rewards.sandbox.run import Limits
from megatron_flowrl.rewards.sandbox.tests import HERE, Verdict, same_output, same_value

_MARK = "result of the call: "
_CALLER = """
import json as _json, sys as _sys
_given, _plain = _sys.stdin.read(), {{}}
exec({plain!r}, _plain)
_owner, _, _name = {entry!r}.rpartition(".")
_function = getattr(globals()[_owner](), _name) if _owner else globals()[_name]
_result = _plain["encode"](_function(*_plain["decode"](_json.loads(_given))))
print("\\n" + {mark!r} + _json.dumps(_result))
"""


def by_server(url: str, program: str, problem: Mapping[str, Any], limits: Limits) -> Verdict:
    """Run each test by a request. Raises ValueError where the server does not do it, or the tests are a program."""
    if "inputs" in problem:
        tests = [(given, output, program) for given, output in zip(problem["inputs"], problem["outputs"], strict=True)]
    elif "calls" in problem:
        plain = (HERE / "plain.py").read_text()
        caller = program + _CALLER.format(plain=plain, entry=problem["entry_point"], mark=_MARK)
        tests = [(json.dumps(encode(call["args"])), call["expected"], caller) for call in problem["calls"]]
    else:
        raise ValueError("tests that are programs (prompt, test) cannot be run on reward.code.server: leave it out")
    passed, why = 0, ""
    for number, (given, expected, code) in enumerate(tests):
        trouble = _trouble(url, code, given, expected, limits, is_output="inputs" in problem)
        passed += not trouble
        why = why or (f"test {number}: {trouble}" if trouble else "")
    return Verdict(passed, len(tests), why)


def _trouble(url: str, code: str, given: str, expected: Any, limits: Limits, *, is_output: bool) -> str:
    request = {
        "code": code,
        "language": "python",
        "stdin": given,
        "run_timeout": limits.wall_seconds,
        "memory_limit_MB": limits.memory_bytes // 2**20,
    }
    reply = post(f"{url.rstrip('/')}/run_code", request, timeout=4 * limits.wall_seconds)
    run = reply.get("run_result") if isinstance(reply, dict) else None
    if not isinstance(run, dict) or reply.get("status") == "SandboxError":
        raise ValueError(f"{url} could not run the program: {str(reply)[:200]}")
    if run.get("status") != "Finished" or run.get("return_code") != 0:
        return f"{run.get('status')}, exit status {run.get('return_code')}: {str(run.get('stderr'))[-200:]}"
    output = str(run.get("stdout"))
    if is_output:
        return "" if same_output(output, expected) else "another output than expected"
    _, mark, result = output.rpartition(_MARK)
    try:
        right = bool(mark) and same_value(decode(json.loads(result)), expected)
    except (NotPlain, ValueError):
        right = False
    return "" if right else "another value than expected"


__all__ = ["by_server"]
