"""Programs in responses: which one counts, which tests there are, and what they are worth."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.config import CodeConfig, RewardConfig, UserError
from megatron_flowrl.rewards.code import program_of
from megatron_flowrl.rewards.find import check_ground_truth, make_grader
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import GraderPool
from megatron_flowrl.rewards.sandbox.library import library_of
from megatron_flowrl.rewards.sandbox.run import PYTHON, Jail, JailBroken, Limits
from megatron_flowrl.rewards.sandbox.walls import walls

pytestmark = pytest.mark.skipif(not walls().namespaces, reason=f"no namespaces here: {walls().trouble}")

OUTPUT = {"inputs": ["1 2", "5 5"], "outputs": ["3", "10"]}
CALLS = {"entry_point": "add", "calls": [{"args": [1, 2], "expected": 3}, {"args": [[1], [2]], "expected": [1, 2]}]}
CHECK = {
    "entry_point": "add",
    "prompt": "def add(a, b):\n    '''Their sum.'''\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(a=1, b=1) == 2\n",
}
HUMANEVAL = Path(__file__).parents[3] / "shared" / "data" / "humaneval.jsonl"


def score(response: str, ground_truth: Any, **code: Any) -> float:
    grade = make_grader(RewardConfig(grader="code", code=CodeConfig(**code)))([Item(response, ground_truth)])[0]
    assert grade.problem is None
    return grade.score


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1\n", "x = 1\n"),
        ("First\n```python\nx = 1\n```\nthen\n```\nx = 2\n```\ndone", "x = 2\n"),
        ("```python\nx = 1\n```\nprints\n```text\n1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("Answer:\n  ```python\n  x = 1\n  ```\n", "  x = 1\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("", ""),
    ],
)
def test_the_last_block_that_is_python_is_the_program(response: str, program: str) -> None:
    assert program_of(response) == program


def test_each_kind_of_tests() -> None:
    add = "```python\nprint(sum(map(int, input().split())))\n```"
    assert score(add, OUTPUT) == 1.0 and score("print(3)", OUTPUT) == 0.0
    assert score("print(3)", OUTPUT, score="fraction") == 0.5
    assert score(add, json.dumps(OUTPUT)) == 1.0
    assert score("def add(a, b): return a + b", CALLS) == 1.0
    assert score("def add(a, b): return 3", CALLS, score="fraction") == 0.5
    assert score("def add(a, b): return a + b", CHECK) == 1.0
    assert score("    return a + b", CHECK) == 1.0  # goes on from the prompt
    assert score("    return a - b", CHECK) == 0.0
    needs_helper = {**CHECK, "prompt": "def twice(x): return 2 * x\n" + CHECK["prompt"]}
    assert score("def add(a, b): return (twice(a) + twice(b)) // 2", needs_helper) == 1.0
    assert score("print(sum(map(int, input().split())))\nexit()", OUTPUT) == 1.0
    main = "def add(a, b): return a + b\nif __name__ == '__main__': print(add(*map(int, input().split())))"
    assert score(main, CALLS) == score(main, OUTPUT) == 1.0


def test_a_test_that_misses_something_is_no_wrong_answer() -> None:
    broken = {**CHECK, "test": "import no_such_module\n" + CHECK["test"]}
    with pytest.raises(JailBroken, match="the test cannot be run: ModuleNotFoundError: No module named 'no_such"):
        score("def add(a, b): return a + b", broken)


def test_a_time_limit_that_is_too_short_for_one_test_is_refused() -> None:
    with pytest.raises(UserError, match=r"timeout_seconds = 8 is for all tests .*wall_seconds = 8 for one of them"):
        make_grader(RewardConfig(grader="code", timeout_seconds=8.0))


def test_a_folder_of_packages_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "helper.py").write_text("three = 3")
    (tmp_path / "link").symlink_to(folder)
    tmp_path.chmod(0o755)  # a superuser's programs run as nobody
    program = "import helper\nprint(helper.three if input() == '1 2' else 10)"
    assert score(program, OUTPUT) == 0.0
    assert (
        score(program, OUTPUT, readable=(str(folder),))
        == score(program, OUTPUT, readable=(str(tmp_path / "link"),))
        == 1.0
    )
    with pytest.raises(UserError, match=r"reward\.code\.readable .*: 'lib' is no folder's absolute path"):
        score(program, OUTPUT, readable=("lib",))


def test_packages_of_this_environment_and_nothing_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one_package", "another_package"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("three = 3")
    tmp_path.chmod(0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    program = "import NAME\nprint(NAME.three if input() == '1 2' else 10)"
    one, another = (program.replace("NAME", name) for name in ("one_package", "another_package"))
    assert score(one, OUTPUT) == 0.0
    assert score(one, OUTPUT, packages=("one_package",)) == 1.0
    assert score(another, OUTPUT, packages=("one_package",)) == 0.0
    with pytest.raises(UserError, match=r"reward\.code\.packages: 'nonesuch' is no package of this environment"):
        score(one, OUTPUT, packages=("nonesuch",))


def test_a_limit_is_of_a_call_and_not_of_all_calls_together() -> None:
    slow = "import time\n\ndef wait(x):\n    time.sleep(x)\n    return x"
    calls = [{"args": [0.4], "expected": 0.4}] * 5
    assert score(slow, {"entry_point": "wait", "calls": calls}, wall_seconds=1.0) == 1.0
    calls = [*calls[:2], {"args": [4], "expected": 4}]
    assert score(slow, {"entry_point": "wait", "calls": calls}, wall_seconds=1.0) == 0.0
    assert score(slow, {"entry_point": "wait", "calls": calls}, wall_seconds=1.0, score="fraction") == 2 / 3


def test_all_tests_together_end_before_their_time_limit() -> None:
    """So that a program that is slow in every test is wrong, and not one that could not be graded."""
    slow = "import time\ntime.sleep(0.7)\nprint(input())"
    truth = {"inputs": ["1"] * 20, "outputs": ["1"] * 20}
    code = CodeConfig(wall_seconds=2.0, score="fraction")
    (grade,) = make_grader(RewardConfig(grader="code", timeout_seconds=6.0, code=code))([Item(slow, truth)])
    assert grade.problem is None and 0.0 < grade.score <= 6 / 20


def test_a_prelude_goes_before_a_program() -> None:
    truth = {"inputs": ["[1, 2]", "[5]"], "outputs": ["3", "5"], "prelude": "from json import *"}
    assert score("print(sum(loads(input())))", truth) == 1.0
    assert score("print(sum(loads(input())))", {**truth, "prelude": ""}) == 0.0


def test_nothing_of_ours_is_in_a_programs_compilation() -> None:
    truth = {"entry_point": "f", "calls": [{"args": [1], "expected": 1}]}
    assert score("def f(x: int):\n    return x", truth) == 1.0
    assert score("def f(x: NoSuch):\n    return x", truth) == 0.0  # as Python has it without a future import


def test_a_package_that_cannot_be_imported_in_a_jail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_another").mkdir()
    (tmp_path / "needs_another" / "__init__.py").write_text("import megatron_flowrl")
    tmp_path.chmod(0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"needs_another cannot be imported in a jail: .*No module named"):
        score("print(3)", OUTPUT, packages=("needs_another",))


def test_without_namespaces_only_installed_packages_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert library_of((), ("a_package",), namespaces=True).paths == (str(tmp_path),)
    with pytest.raises(ValueError, match="all of which programs could read without namespaces"):
        library_of((), ("a_package",), namespaces=False)
    assert [Path(path).name for path in library_of((), ("numpy",), namespaces=False).folders][:1] == ["numpy"]


def test_a_test_that_needs_numpy() -> None:
    test = "import numpy\ndef check(candidate):\n    assert numpy.allclose(candidate(1, 2), 3)\n"
    truth = {"entry_point": "add", "prompt": CHECK["prompt"], "test": test}
    assert score("def add(a, b):\n    return a + b", truth, packages=("numpy",)) == 1.0
    assert score("def add(a, b):\n    return a - b", truth, packages=("numpy",)) == 0.0


@pytest.mark.parametrize(
    "truth",
    [None, "{", "[]", {}, {"inputs": ["1"]}, {"inputs": ["1"], "outputs": []}, {"inputs": [1], "outputs": [2]},
     {"calls": []}, {"entry_point": "f", "calls": []}, {"entry_point": "f", "calls": [{"args": [1]}]},
     {"entry_point": "f", "prompt": "x"}],
)  # fmt: skip
def test_what_has_no_tests_is_refused(truth: Any) -> None:
    assert "the ground truth" in str(check_ground_truth("code", truth))
    for good in (OUTPUT, CALLS, CHECK):
        assert check_ground_truth("code", good) is None


def test_in_a_pool_one_answer_does_not_hurt_the_next() -> None:
    settings = RewardConfig(grader="code", workers=1, timeout_seconds=60.0, code=CodeConfig(wall_seconds=2.0))
    good = "print(sum(map(int, input().split())))"
    answers = [good, "while True: pass", "import os; os.kill(-1, 9)", good, "import os; os._exit(0)", good]
    with GraderPool(settings) as pool:
        grades = pool.grade([Item(answer, OUTPUT) for answer in answers])
        assert pool.problems == {}
    assert grades == [Grade(value) for value in (1.0, 0.0, 0.0, 1.0, 0.0, 1.0)]


@pytest.fixture
def fusion() -> Iterator[str]:
    """The address of a stand-in for SandboxFusion that runs what it is sent in a jail."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/run_code" and asked["language"] == "python" and asked["run_timeout"] == 8.0
            with Jail([PYTHON, "-S", "x.py"], {"x.py": asked["code"]}, Limits(), namespaces=True) as jail:
                done = jail.run(asked["stdin"].encode())
            run = {"status": "Finished" if done.code == 0 else "Error", "return_code": done.code}
            run |= {"stdout": done.output.decode(), "stderr": done.errors.decode()}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "Success", "run_result": run}).encode())

        def log_message(self, *_: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_programs_can_run_on_a_server(fusion: str) -> None:
    assert score("print(sum(map(int, input().split())))", OUTPUT, server=fusion) == 1.0
    assert score("print(3)", OUTPUT, server=fusion, score="fraction") == 0.5
    assert score("def add(a, b): return a + b", CALLS, server=fusion) == 1.0
    assert score("def add(a, b): return (1, 2) if a == [1] else 3", CALLS, server=fusion) == 1.0
    assert score("def add(a, b): raise ValueError", CALLS, server=fusion) == 0.0
    own_names = "def encode(x): return 'mine'\ndef decode(x): return x\ndef add(a, b): return a + b"
    assert score(own_names, CALLS, server=fusion) == 1.0
    with pytest.raises(ValueError, match=r"cannot be run on reward\.code\.server"):
        score("def add(a, b): return a + b", CHECK, server=fusion)


@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="HumanEval's file is not here")
@pytest.mark.timeout(600)
def test_humaneval_by_its_own_solutions() -> None:
    rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]
    right, wrong = [], []
    for row in rows:
        truth = {"entry_point": row["entry_point"], "prompt": row["prompt"], "test": row["tests"]}
        right.append(Item(row["prompt"] + row["canonical_solution"], truth))
        wrong.append(Item(row["prompt"] + "    return None\n", truth))
    with GraderPool(RewardConfig(grader="code", workers=2, timeout_seconds=120.0)) as pool:
        assert [grade.score for grade in pool.grade(right)] == [1.0] * 164
        assert [grade.score for grade in pool.grade(wrong)] == [0.0] * 164
