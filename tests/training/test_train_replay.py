"""Runs on recorded rollouts, as a user starts them: the same losses and the same weights in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_flowrl.cli import main
from tests.distributed.ranks import run_module
from tests.tiny_tasks import save_task
from tests.training.recorded import arguments, metrics_of, write_records

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

STEPS = 3  # of two updates each


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and records."""
    folder = save_task(tmp_path_factory.mktemp("task"))
    write_records(folder, folder / "records", STEPS)
    return folder


def trained(task: Path, name: str, ranks: int, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Lines of metrics.jsonl, and what became of every weight."""
    run = task / name
    done = run_module("megatron_flowrl", arguments(task, task / "records", run, **settings), ranks)
    assert done.returncode == 0, done.stdout[-5000:]
    main(["convert", "megatron-to-hf", str(run / "checkpoints"), str(run / "hf")])
    before, after = load_file(task / "model" / "model.safetensors"), load_file(run / "hf" / "model.safetensors")
    return metrics_of(run), {name: after[name].double() - before[name].double() for name in before}


@pytest.fixture(scope="module")
def one_rank(task: Path) -> Any:
    """FlowRL `exact` on one rank."""
    return trained(task, "one", 1, objective__preset="exact")


def check_same(found: Any, expected: Any, share: float = 1e-3) -> None:
    """Losses to 1e-5 of theirs, each tensor's change to a share of its norm."""
    for line, other in zip(found[0], expected[0], strict=True):
        assert line["update/loss"] == pytest.approx(other["update/loss"], rel=1e-5, abs=1e-6)
    for name, change in expected[1].items():
        assert change.norm() > 0, name
        assert (found[1][name] - change).norm() <= share * change.norm(), name


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("tp2", {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}, 1e-3),
        ("pp2", {"parallel__pipeline_model_parallel_size": 2}, 1e-3),
        ("dp2", {}, 1e-3),
        # The bias of keys has gradients near 0, of which rounding is a part that Adam makes large.
        ("cp2", {"parallel__context_parallel_size": 2}, 3e-3),
    ],
)
def test_layouts_learn_the_same(name: str, settings: dict[str, Any], share: float, task: Path, one_rank: Any) -> None:
    check_same(trained(task, name, 2, objective__preset="exact", **settings), one_rank, share)


def test_ppo_with_its_critic_learns_the_same_on_two_ranks(task: Path) -> None:
    settings: dict[str, Any] = {"objective__name": "ppo", "critic__lr": 1e-3}
    one, two = (trained(task, f"ppo{ranks}", ranks, **settings) for ranks in (1, 2))
    check_same(two, one)
    losses = [[line["critic/value_loss"] for line in found[0]] for found in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_older_pair_is_used_where_the_critics_checkpoint_is_damaged(task: Path) -> None:
    run = task / "ppo_damaged"
    settings: dict[str, Any] = {"objective__name": "ppo", "critic__lr": 1e-3}
    trained(task, "ppo_damaged", 1, **settings)
    before = metrics_of(run)
    shard = next((run / "checkpoints_critic" / "step_00000003").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    done = run_module("megatron_flowrl", arguments(task, task / "records", run, **settings), 1)
    assert done.returncode == 0 and "the checkpoints of step 3 are passed over" in done.stdout, done.stdout[-3000:]
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3]
    assert metrics_of(run)[2]["critic/value_loss"] == before[2]["critic/value_loss"]


def test_the_first_step_is_on_policy_and_at_the_reference(one_rank: Any) -> None:
    first, *later = one_rank[0]
    assert first["update/first_weight_mean"] == first["update/first_weight_max"] == 1.0
    assert first["update/first_kl_reference"] == first["update/first_kl_old"] == 0.0
    assert all(line["update/first_weight_max"] == 1.0 and line["update/first_kl_reference"] > 0 for line in later)
    assert all(line["update/updates"] == 2 for line in one_rank[0])
