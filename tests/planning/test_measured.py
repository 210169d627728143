"""Planned bytes beside what the real model, DDP, optimizer and autograd take on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_worker
from tests.planning.cases import CASES

_WITHIN = 0.1


@pytest.mark.distributed
def test_planned_bytes_are_those_measured(tmp_path: Path) -> None:
    """Three families in four layouts (DP2, TP2 with SP, PP2, CP2); recomputation, VPP, buckets, fp32, tied weights."""
    run_worker("tests.planning.measured_worker", [str(tmp_path), *CASES], 2)
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(found) == 2 * len(CASES)
    wrong = {
        f"{name}, {kind}": (one["planned"][kind], measured)
        for name, one in found.items()
        for kind, measured in one["measured"].items()
        if abs(one["planned"][kind] / measured - 1) > _WITHIN
    }
    assert wrong == {}, "planned, measured"
