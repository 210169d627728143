"""Planned bytes beside what the real model, DDP, optimizer and autograd take on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_worker
from tests.planning.cases import CASES

_WITHIN = 0.1
_FAMILIES = ("qwen2", "llama", "qwen3")


def measure(names: list[str], ranks: int, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    run_worker("tests.planning.measured_worker", [str(folder), *names], ranks)
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


def check(found: dict[str, dict[str, dict[str, float]]]) -> None:
    wrong = {
        f"{name}, {kind}": (one["planned"][kind], measured)
        for name, one in found.items()
        for kind, measured in one["measured"].items()
        if abs(one["planned"][kind] / measured - 1) > _WITHIN
    }
    assert wrong == {}, "planned, measured"


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_planned_bytes_are_those_measured(ranks: int, tmp_path: Path) -> None:
    """Three families in four layouts (one rank, TP2 with SP, PP2, CP2); recomputation, VPP, DP, fp32, tied weights."""
    names = [name for name, case in CASES.items() if case.ranks == ranks]
    found = measure(names, ranks, tmp_path)
    assert len(found) == ranks * len(names)
    check(found)
