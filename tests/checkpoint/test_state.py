"""What becomes of a layer's own state, such as the scales of FP8."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.model.build import ParallelModel

ALLOWED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


class Scaled(torch.nn.Module):
    """As Transformer Engine's layers under the delayed recipe, which write a pickle and read it only where allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.scales: Any = None

    def get_extra_state(self) -> bytes:
        return b"scales"

    def set_extra_state(self, state: bytes) -> None:
        if os.environ.get(ALLOWED, "0") != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")
        self.scales = state


def restored() -> Scaled:
    layer = Scaled()
    model = cast(ParallelModel, SimpleNamespace(modules=[layer]))
    TrainingState(model).restore({"model": {"model0": {"weight": torch.ones(2), "_extra_state": b"scales"}}})
    return layer


def test_pickled_scales_come_back_and_the_permission_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOWED, raising=False)
    layer = restored()
    assert layer.scales == b"scales" and layer.weight.tolist() == [1.0, 1.0]
    assert ALLOWED not in os.environ


def test_who_forbids_pickles_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "0")
    with pytest.raises(RuntimeError, match="Refusing to load"):
        restored()
    assert os.environ[ALLOWED] == "0"
