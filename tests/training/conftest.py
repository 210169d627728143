"""A tiny model, and `score` run on it in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.tiny_models import save_model
from tests.training.score_inputs import Command, Outcome, make_command, run_main

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
Run = Callable[[Command], Outcome]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_tied", tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(tmp_path: Path, model: Path) -> Command:
    return make_command(tmp_path / "run", model)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process, which belongs to no process group before and after."""

    def run_here(command: Command) -> Outcome:
        assert not dist.is_initialized(), "an earlier test left a process group"
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in command.environment.items():
            monkeypatch.setenv(name, value)
        outcome = run_main(command.arguments)
        assert not dist.is_initialized()
        return outcome

    return run_here
