"""The world as the environment tells it, and a process group of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_flowrl.config import ParallelConfig, UserError
from megatron_flowrl.platform import Platform
from megatron_flowrl.platform.distributed import (
    World,
    destroy_process_groups,
    initialize_process_groups,
    read_world,
    to_all_pipeline_stages,
    together,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environment", [{}, {"PATH": "/bin"}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}])
def test_without_torchrun_the_world_is_this_process(environment: dict[str, str]) -> None:
    assert read_world(environment) == World(rank=0, size=1, local_rank=0, under_torchrun=False)


def test_torchruns_variables() -> None:
    assert read_world(TORCHRUN) == World(rank=5, size=8, local_rank=1, under_torchrun=True)
    alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert read_world(alone) == World(0, 1, 0, under_torchrun=True)


def test_the_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_world().rank == 5
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    assert read_world() == World()


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_missing_variable_is_named(missing: str) -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UserError) as caught:
        read_world(environment)
    given, _, lacking = str(caught.value).partition(" but not ")
    assert lacking.startswith(f"{missing}:")
    assert all(name in given for name in environment)


def test_all_missing_variables_are_named() -> None:
    with pytest.raises(UserError, match="sets RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "):
        read_world({"RANK": "0"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "one", "1.5", "0x1"])
def test_what_is_not_a_number_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        read_world({**TORCHRUN, name: value})
    assert f"{name} = {value!r} is not a whole number" in str(caught.value)


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("9", "8"), ("0", "0"), ("-1", "8"), ("0", "-1")])
def test_the_rank_is_below_the_world_size(rank: str, size: str) -> None:
    with pytest.raises(UserError, match=f"RANK = {rank} is not below WORLD_SIZE = {size}"):
        read_world({**TORCHRUN, "RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize("local_rank", ["-1", "8"])
def test_the_local_rank_is_one_of_the_world(local_rank: str) -> None:
    with pytest.raises(UserError, match="LOCAL_RANK"):
        read_world({**TORCHRUN, "LOCAL_RANK": local_rank})


def test_a_process_group_of_one(one_rank_platform: Platform) -> None:
    assert dist.get_world_size() == 1 and dist.get_backend() == one_rank_platform.backend
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert parallel_state.get_data_parallel_world_size() == 1
    values = torch.arange(3.0, device=one_rank_platform.device)
    dist.all_reduce(values)
    assert to_all_pipeline_stages(values) is values and values.tolist() == [0.0, 1.0, 2.0]


def test_a_group_that_is_there_is_kept(one_rank_platform: Platform) -> None:
    """Only Megatron's groups inside it are made anew, such as for another layout."""
    group = dist.group.WORLD
    parallel_state.destroy_model_parallel()
    initialize_process_groups(World(), ParallelConfig(), one_rank_platform, seed=1)
    assert dist.group.WORLD is group and parallel_state.model_parallel_is_initialized()


def test_groups_are_left_and_joined_again(one_rank_platform: Platform) -> None:
    destroy_process_groups()
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    destroy_process_groups()  # safe when there is none
    initialize_process_groups(World(), ParallelConfig(), one_rank_platform, seed=1)
    assert dist.is_initialized() and parallel_state.model_parallel_is_initialized()


def test_problems_found_together_are_raised(one_rank_platform: Platform) -> None:
    with pytest.raises(UserError) as caught, together():
        raise UserError("one", "two", "one")
    assert caught.value.problems == ("one", "two")
    with together():
        pass
