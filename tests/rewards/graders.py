"""Graders for the tests of pools: what the response says is what happens."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_flowrl.config import RewardConfig
from megatron_flowrl.rewards.find import make_grader
from megatron_flowrl.rewards.grader import Grade, Item

if "FATAL_IMPORT" in os.environ and Path(os.environ["FATAL_IMPORT"]).exists():
    os._exit(7)


def by_word(items: Sequence[Item]) -> Any:
    """Calls what the first word of the response names, with the item."""
    return [DEEDS[item.response.split()[0]](item) for item in items]


def lengths(items: Sequence[Item]) -> list[float]:
    return [float(len(item.response)) for item in items]


def wrong_number(items: Sequence[Item]) -> list[float]:
    return [1.0] * (len(items) + 1)


def not_finite(items: Sequence[Item]) -> list[float]:
    return [float("nan")] * len(items)


def no_sequence(items: Sequence[Item]) -> Any:
    return 1.0


def math_and_modules(items: Sequence[Item]) -> list[Grade]:
    """What is imported in a process that has graded mathematics, countdown and reasoning-gym."""
    for name in ("math", "countdown", "reasoning_gym"):
        make_grader(RewardConfig(grader=name))
    return [Grade(float("torch" in sys.modules) + float("megatron" in sys.modules))]


not_callable = 3


class Stateful:
    pass


def _hang(item: Item) -> float:
    while True:
        pass


def _hang_in_c(item: Item) -> float:
    return float(sum(itertools.repeat(1)))  # never lets go of the interpreter


def _family(item: Item) -> float:
    """A child in the group, one in a session of its own, and a hang; their ids and its own go to the file."""
    command = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
    children = [subprocess.Popen(command), subprocess.Popen(command, start_new_session=True)]
    found = Path(item.row["file"])
    found.with_suffix(".new").write_text(json.dumps([os.getpid(), os.getppid(), *(child.pid for child in children)]))
    found.with_suffix(".new").rename(found)
    return DEEDS[item.row.get("then", "hang")](item)


def _wait_for_file(item: Item) -> float:
    while not Path(item.row["file"]).exists():
        time.sleep(0.005)
    return 1.0


def _score(item: Item) -> Any:
    return eval(item.response.split(maxsplit=1)[1], {"Grade": Grade})


DEEDS: dict[str, Callable[[Item], Any]] = {
    "score": _score,
    "pid": lambda item: Grade(1.0, str(os.getpid())),
    "raise": lambda item: [].pop(),
    "sysexit": lambda item: sys.exit("enough"),
    "exit": lambda item: os._exit(3),
    "segfault": lambda item: ctypes.string_at(0),
    "kill": lambda item: os.kill(os.getpid(), signal.SIGKILL),
    "hang": _hang,
    "hang_in_c": _hang_in_c,
    "family": _family,
    "memory": lambda item: len(bytearray(8 * 2**30)),
    "wait": _wait_for_file,
    "print": lambda item: print("noise on the standard output") or 1.0,
    "key": lambda item: Grade(1.0, "k" * 10_000_000),
}
