"""Traces of chosen steps and ranks, and of no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_flowrl.config import TrackingConfig
from megatron_flowrl.observe.profile import profiled

SETTINGS = TrackingConfig(profile_steps=(3,), profile_ranks=(0, 2))


def work() -> None:
    with torch.profiler.record_function("a phase"):
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))


def test_a_chosen_step_leaves_a_chrome_trace(tmp_path: Path) -> None:
    with profiled(SETTINGS, 3, 2, tmp_path):
        work()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step_3_rank_2.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"a phase", "aten::mm"} <= names


@pytest.mark.parametrize(("step", "rank"), [(2, 0), (3, 1)])
def test_others_leave_nothing(step: int, rank: int, tmp_path: Path) -> None:
    with profiled(SETTINGS, step, rank, tmp_path):
        work()
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), profiled(SETTINGS, 3, 0, tmp_path):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())
    with profiled(SETTINGS, 3, 0, tmp_path):  # and the profiler is free again
        work()
    assert len(list(tmp_path.rglob("*.gz"))) == 1


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    with profiled(SETTINGS, 3, 0, tmp_path):
        work()
    assert "step_3_rank_0.json.gz could not be written" in said.text
