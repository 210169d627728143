"""Programs in a jail: good ones pass, attacks are worth nothing, and nothing is left of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_flowrl.config import UserError
from megatron_flowrl.rewards.sandbox import walls as walls_module
from megatron_flowrl.rewards.sandbox.run import PYTHON, Jail, JailBroken, Limits
from megatron_flowrl.rewards.sandbox.tests import Verdict, by_calls, by_output, same_output
from megatron_flowrl.rewards.sandbox.walls import Walls, checked_walls, walls

pytestmark = pytest.mark.skipif(not walls().namespaces, reason=f"no namespaces here: {walls().trouble}")

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=3.0, memory_bytes=2**28, file_bytes=2**20, folder_bytes=2**22)
GOOD = "print(int(input()) + 1)"
TESTS = [("41", "42\n"), ("-1", "0")]
CALLS = {"calls": [{"args": [41], "expected": 42}, {"args": [-1], "expected": 0}]}

# Programs that would answer 42 if they got their way.
ATTACKS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads": "import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(9,)).start()",
    "10 GB": "x = bytearray(10 * 2**30)",
    "memory of many": "import os, time\nfor _ in range(8): os.fork()\nx = bytearray(200 * 2**20)\ntime.sleep(9)",
    "endless output": "while True: print('42' * 1000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "reads /etc/passwd": "open('/etc/passwd').read(); print(42)",
    "reads the home": f"import os; os.listdir({str(Path.home())!r}); print(42)",
    "reads the repository": f"open({str(Path(__file__).resolve())!r}).read(); print(42)",
    "reads the root": "import os; os.listdir('/'); print(42)",
    "a symlink out": "import os; os.symlink('/etc/passwd', 'x'); open('x').read(); print(42)",
    "a hard link out": "import os; os.link('/usr/bin/env', 'x'); print(42)",
    "writes outside": "open('/usr/x', 'w').write('x'); print(42)",
    "writes to the root": "open('/x', 'w').write('x'); print(42)",
    "a large file": "open('x', 'wb').write(bytes(2**22)); print(42)",
    "many files": "for i in range(10**4): open(str(i), 'wb').write(bytes(1000))\nprint(42)",
    "many open files": "x = [open('/dev/null') for _ in range(1000)]; print(42)",
    "a socket": "import socket; socket.socket(); print(42)",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', 80)); print(42)",
    "kills its parent": "import os; os.kill(os.getppid(), 9); os.kill(1, 9); import time; time.sleep(9)",
    "kills all": "import os; os.kill(-1, 9); import time; time.sleep(9)",
    "ptrace": "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0; print(42)",
    "init's memory": "open('/proc/1/mem', 'rb').read(1); print(42)",
    "init's environment": "open('/proc/1/environ', 'rb').read(); print(42)",
    "new namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0; print(42)",
    "a mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0; print(42)",
    "chroot": "import os; os.chroot('.'); print(42)",
    "becomes root": "import os; os.setuid(0); print(42)",
    "makes a device": "import os; os.mknod('x', 0o600 | 0o020000, os.makedev(1, 1)); print(42)",
    "io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 1, 0) >= 0; print(42)",
    "the kernel's settings": "open('/proc/sys/kernel/hostname', 'w').write('x'); print(42)",
    "ends at once": "import os; os._exit(0)",
    "forges its report": (
        "import os\nprint(42, flush=True)\nfor d in range(3, 64):\n"
        "  try: os.write(d, b'{\"code\": 0, \"reason\": \"\"}\\n')\n  except OSError: pass\nos._exit(7)"
    ),
    "memory in files": "import os; os.memfd_create('x'); print(42)",
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0; print(42)",
    "loops": "while True: pass",
    "loops past its signals": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "sleeps": "import time; time.sleep(99)",
    "counts too far": "9**9**9",
    "recursion": "def f(): f()\nimport sys; sys.setrecursionlimit(10**9); f()",
    "execs a shell": "import os; os.execv('/bin/sh', ['sh', '-c', 'cat /etc/passwd && echo 42'])",
}  # fmt: skip

# Functions f that would be right if they got their way.
FALSE_ANSWERS = {
    "equal to all": "class E:\n  __eq__ = lambda a, b: True\nf = lambda x: E()",
    "an int equal to all": "class E(int):\n  __eq__ = lambda a, b: True\nf = lambda x: E(7)",
    "a forged verdict": (
        "import os\ndef f(x):\n  for d in range(3, 20):\n    try: os.write(d, b'{\"verdict\": [2, 2, \"\"]}\\n')\n"
        "    except OSError: pass\n  return 7"
    ),
    "prints a verdict": "def f(x):\n  print('{\"verdict\": [2, 2, \"\"]}', flush=True)\n  return 7",
    "ends before the tests": "import os; os._exit(0)",
    "ends in a call": "import os\ndef f(x): os._exit(0)",
    "exits in a call": "import sys\ndef f(x): sys.exit(0)",
    "patches comparison": "import builtins, operator\noperator.eq = builtins.all = lambda *_: True\nf = lambda x: 7",
    "looks for what is expected": (
        "import gc, os\ndef f(x):\n  for d, _, names in os.walk('.'):\n    for n in names:\n"
        "      t = open(os.path.join(d, n), errors='replace').read()\n"
        "      if '\"expected\": ' in t: return int(t.split('\"expected\": ')[1].split('}')[0])\n  return 7"
    ),
    "endless": "import itertools\nf = lambda x: list(itertools.count())",
    "a value too deep": "def f(x):\n  y = []\n  for _ in range(10**5): y = [y]\n  return y",
    "a long line": "f = lambda x: 'x' * 2**25",
    "no function": "g = 1",
    "no Python": "f(x) = x + 1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Neither a process nor a file; those of files of tests that run at the same time come and go."""
    yield
    folder = Path(tempfile.gettempdir(), f"flowrl-jails-{os.getuid()}")
    deadline = time.monotonic() + 60
    while left := [*map(str, folder.iterdir()), *jailed()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def jailed() -> list[str]:
    """Command lines of this test's processes that are in a jail, or keep one."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word in (b"answer.py", b"inside.py") or b"sandbox.jail" in word for word in words):
            found.append(b" ".join(words).decode(errors="replace")[:100])
    return found


def test_a_good_program_passes() -> None:
    assert by_output(GOOD, TESTS, LIMITS, namespaces=True) == Verdict(2, 2)
    assert by_output("print(42)", TESTS, LIMITS, namespaces=True) == Verdict(
        1, 2, "test 1: another output than expected"
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_worth_nothing_and_harms_nobody(name: str) -> None:
    began = time.monotonic()
    verdict = by_output(ATTACKS[name], TESTS[:1], LIMITS, namespaces=True)
    assert verdict.passed == 0 and verdict.why, verdict
    assert time.monotonic() - began < LIMITS.wall_seconds + 3
    assert by_output(GOOD, TESTS[:1], LIMITS, namespaces=True) == Verdict(1, 1)


def test_a_daemon_does_not_outlive_its_program() -> None:
    daemon = (
        "import os, time\nif not os.fork():\n  os.setsid()\n  if not os.fork():\n    time.sleep(60)\n  os._exit(0)\n"
    )
    began = time.monotonic()
    assert by_output(daemon + GOOD, TESTS, LIMITS, namespaces=True) == Verdict(2, 2)
    assert time.monotonic() - began < 3


def test_without_namespaces_what_a_program_starts_is_ended_too() -> None:
    """What code.unprotected=true stands for. Landlock, seccomp and limits are there still, where the machine has them.

    No fork bomb here: a superuser's is not held by a limit on processes.
    """
    child = "import os, time\nif not os.fork():\n  os.setsid()\n  time.sleep(60)\n"
    assert by_output(child + GOOD, TESTS, LIMITS, namespaces=False) == Verdict(2, 2)
    assert by_output(child + "time.sleep(60)", TESTS[:1], LIMITS, namespaces=False).why == "test 0: time limit"
    assert by_calls("def f(x): return x + 1", CALLS, "f", LIMITS, namespaces=False) == Verdict(2, 2)
    assert by_calls(child + "f = lambda x: time.sleep(60)", CALLS, "f", LIMITS, namespaces=False).passed == 0
    if walls().landlock:
        assert by_output(ATTACKS["reads /etc/passwd"], TESTS[:1], LIMITS, namespaces=False).passed == 0


@pytest.mark.parametrize(
    ("program", "entry"),
    [("def f(x): return x + 1", "f"), ("class Solution:\n  def f(self, x): return x + 1", "Solution.f")],
)
def test_a_good_function_passes(program: str, entry: str) -> None:
    assert by_calls(program, CALLS, entry, LIMITS, namespaces=True) == Verdict(2, 2)


@pytest.mark.parametrize("name", FALSE_ANSWERS)
def test_a_false_answer_is_worth_nothing(name: str) -> None:
    verdict = by_calls(FALSE_ANSWERS[name], CALLS, "f", LIMITS, namespaces=True)
    assert verdict.passed == 0 and verdict.of == 2 and verdict.why, verdict


def test_a_check_calls_the_function_and_sees_what_it_does_to_arguments_and_raises() -> None:
    given = {
        "prompt": "def double(x):\n  return 2 * x\n\ndef f(x):\n  '''To do.'''\n",
        "test": (
            "def check(candidate):\n  x = [3, 1]\n  assert candidate(x) == (1, 3) and x == [1, 3]\n"
            "  assert candidate([double(2)]) == (4,)\n"
            "  try:\n    candidate(None)\n    assert False\n  except TypeError:\n    pass\n"
        ),
    }
    right = "def f(x):\n  x.sort()\n  return tuple(x)\n".replace(
        "  x.sort()", "  if x is None: raise TypeError\n  x.sort()"
    )
    assert by_calls(right, given, "f", LIMITS, namespaces=True) == Verdict(1, 1)
    assert by_calls("f = lambda x: tuple(x)", given, "f", LIMITS, namespaces=True).passed == 0
    assert by_calls("def f(x): return None", given, "f", LIMITS, namespaces=True).why.startswith("AssertionError")


def test_values_go_through_as_they_are() -> None:
    value = [None, True, 2**80, -0.5, 1e308, 1 + 2j, "é\0\n", b"\xff", (1, [2]), {3}, frozenset({4}), {(5,): {"a": []}}]
    given = {
        "prompt": "",
        "test": f"def check(f):\n  x = {value!r}\n  y = f(x)\n  assert y == x and repr(y) == repr(x)",
    }
    assert by_calls("f = lambda x: x", given, "f", LIMITS, namespaces=True) == Verdict(1, 1)


def test_the_program_is_nobody_and_sees_little() -> None:
    program = (
        "import os, sys\nprint(os.getuid() not in (0,) or 'root', sorted(os.environ), os.getcwd(), os.listdir('.'))"
    )
    with Jail([PYTHON, "-I", "-S", "answer.py"], {"answer.py": program}, LIMITS, namespaces=True) as jail:
        said = jail.run().output.decode()
    assert "/tmp ['answer.py']" in said and "PYTHONPATH" not in said
    assert os.getuid() != 0 or said.startswith("True")


def test_a_command_that_is_not_there() -> None:
    with (
        Jail(["/no/such/program"], {}, LIMITS, namespaces=True) as jail,
        pytest.raises(JailBroken, match="No such file"),
    ):
        jail.run()


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [("1 2\n3", "1 2 \n3\n\n", True), ("1.0", "1", True), ("1e0 2", "1 2.00", True), ("1 2", "1\n2", False),
     ("Yes", "YES", False), ("", "\n", True), ("1", "1 1", False), ("a 1.0", "a 1", True),
     ("b 1.0", "a 1", False), ("nan", "1", False)],
)  # fmt: skip
def test_output_is_compared_line_by_line(found: str, expected: str, same: bool) -> None:
    assert same_output(found, expected) is same


def test_without_walls_nothing_is_run_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "namespaces" in str(walls()) and "resource limits" in str(walls())
    monkeypatch.setattr(walls_module, "walls", lambda: Walls(False, 0, False, "unshare: Operation not permitted"))
    with pytest.raises(UserError, match=r"no namespaces \(unshare: Operation not permitted\); allow unprivileged"):
        checked_walls(unprotected=False)
    assert str(checked_walls(unprotected=True)) == "resource limits"
