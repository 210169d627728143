"""Times graders in a pool of two processes: answers a second.

    python benchmarks/grading.py > grading.json    the table goes to stderr

`math` on word problems' answers: a solution of 120 words with numbers in it, then a boxed whole number, every third of
them wrong. `code` on a function with five calls, of which every third is wrong: two jails each.
"""

import json
import random
import sys
import time

from _report import circumstances

from megatron_flowrl.config import CodeConfig, RewardConfig
from megatron_flowrl.rewards.grader import Item
from megatron_flowrl.rewards.pool import GraderPool

WORKERS = 2
REPEATS = 3
COUNTS = {"math": 2000, "code": 100}


def word_problem(draw: random.Random, number: int) -> Item:
    """An answer to a word problem."""
    words = [draw.choice(["each", "costs", "so", "she", "has", "then", str(draw.randint(2, 99))]) for _ in range(120)]
    right = draw.randint(1, 9999)
    said = right if number % 3 else right + 1
    return Item(f"{' '.join(words)}. Therefore the answer is $\\boxed{{{said}}}$.", str(right))


def program(draw: random.Random, number: int) -> Item:
    """A function, and five calls of it."""
    shift = draw.randint(1, 9)
    calls = [{"args": [n], "expected": n * n + shift} for n in range(5)]
    body = f"return n * n + {shift if number % 3 else shift + 1}"
    return Item(f"```python\ndef f(n):\n    {body}\n```", {"entry_point": "f", "calls": calls})


def measure(grader: str) -> dict[str, object]:
    draw = random.Random(0)
    make = {"math": word_problem, "code": program}[grader]
    items = [make(draw, number) for number in range(COUNTS[grader])]
    rates = []
    with GraderPool(RewardConfig(grader=grader, workers=WORKERS, timeout_seconds=60.0, code=CodeConfig())) as pool:
        pool.grade(items[:20])
        for _ in range(REPEATS):
            began = time.perf_counter()
            grades = pool.grade(items)
            rates.append(len(items) / (time.perf_counter() - began))
        assert pool.problems == {}
    share = sum(grade.score for grade in grades) / len(grades)
    return {"grader": grader, "items": len(items), "per_second": max(rates), "all": rates, "right_share": share}


def main() -> None:
    measured = [measure(grader) for grader in COUNTS]
    print(json.dumps({"circumstances": circumstances(), "workers": WORKERS, "graders": measured}, indent=2))
    for one in measured:
        print(f"{one['grader']:8} {one['per_second']:8.0f} answers/s", file=sys.stderr)


if __name__ == "__main__":
    main()
