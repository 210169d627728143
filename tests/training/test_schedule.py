"""The learning rate of each step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flowrl.config import OptimizerConfig
from megatron_flowrl.training.schedule import build_schedule


def rates(steps: int, **settings: Any) -> list[float]:
    group: dict[str, Any] = {}
    schedule = build_schedule(SimpleNamespace(param_groups=[group]), OptimizerConfig(**settings))  # type: ignore[arg-type]
    found = []
    for _ in range(steps):
        schedule.step(1)
        found.append(group["lr"])
    assert group["weight_decay"] == settings.get("weight_decay", 0.1)
    return found


def test_the_first_step_of_the_warm_up_is_not_lost() -> None:
    assert rates(6, lr=4.0, lr_warmup_iters=4) == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
    assert rates(2, lr=4.0, lr_warmup_iters=0, weight_decay=0.5) == [4.0, 4.0]


@pytest.mark.parametrize("style, middle", [("linear", 2.5), ("cosine", 2.5)])
def test_decays_from_the_end_of_the_warm_up_to_min_lr(style: Any, middle: float) -> None:
    found = rates(12, lr=4.0, lr_warmup_iters=2, lr_decay_style=style, lr_decay_iters=10, min_lr=1.0)
    assert found[:2] == [2.0, 4.0]
    assert found[5] == pytest.approx(middle)
    assert found[9:] == [1.0, 1.0, 1.0]
    assert found[1:10] == sorted(found[1:10], reverse=True)


def test_a_restart_takes_its_place_from_the_state_and_its_settings_from_the_configuration() -> None:
    group: dict[str, Any] = {}
    holder: Any = SimpleNamespace(param_groups=[group])
    before = build_schedule(holder, OptimizerConfig(lr=4.0, lr_warmup_iters=8))
    for _ in range(3):
        before.step(1)
    after = build_schedule(holder, OptimizerConfig(lr=8.0, lr_warmup_iters=8))
    after.load_state_dict(before.state_dict())
    after.step(1)
    assert group["lr"] == 4.0
