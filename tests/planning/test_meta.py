"""The real model on meta tensors, beside what is counted from the architecture."""

from __future__ import annotations

import resource

import pytest
import torch.distributed as dist

from megatron_flowrl.config import Config, UserError, load_config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.planning.memory import trainable_bytes
from megatron_flowrl.planning.meta import build_stages, real_stages
from megatron_flowrl.planning.parameters import Parameter, Stage, counted_stages, layers_of_stages
from megatron_flowrl.planning.shapes import find_shapes


def given(model: str, *parallel: str) -> tuple[Architecture, Config]:
    settings = ["model.path=x", *(f"parallel.{one}" for one in parallel)]
    return find_shapes(model).architecture, load_config(None, settings)


def built(
    architecture: Architecture, config: Config, world_size: int, *, log_z: bool = False, value_head: bool = False
) -> list[Stage]:
    stages = build_stages(architecture, config, world_size, log_z=log_z, value_head=value_head)
    return [tuple(tuple(Parameter(**one) for one in chunk) for chunk in stage) for stage in stages]


def children_seconds() -> float:
    """Processor time of processes that have ended: others may keep this machine busy meanwhile."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def described(stage: Stage) -> list[list[tuple[int, int, bool, bool]]]:
    return [sorted((p.elements, p.itemsize, p.shared, p.matrix) for p in chunk) for chunk in stage]


def test_1024_ranks_in_a_process_of_their_own() -> None:
    architecture, config = given(
        "Qwen2.5-72B",
        "tensor_model_parallel_size=8",
        "pipeline_model_parallel_size=8",
        "sequence_parallel=true",
    )
    begin = children_seconds()
    real = real_stages(architecture, config, 1024, log_z=True)
    assert children_seconds() - begin < 60
    counted = counted_stages(architecture, config, log_z=True)
    assert [described(stage) for stage in real] == [described(stage) for stage in counted]
    assert not dist.is_initialized()


def test_what_megatron_says_is_told() -> None:
    architecture, config = given("Qwen2.5-7B", "pipeline_model_parallel_size=3")  # 28 layers
    with pytest.raises(UserError, match=r"cannot be built in this layout: .*divisible"):
        real_stages(architecture, config, 3)


@pytest.mark.parametrize(
    ("model", "world_size", "parallel"),
    [
        ("Qwen2.5-1.5B", 4, ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2")),
        ("Qwen2.5-0.5B", 8, ("tensor_model_parallel_size=2", "context_parallel_size=2")),
        ("Qwen3-4B", 8, ("pipeline_model_parallel_size=4", "num_layers_in_first_pipeline_stage=6")),
        ("Llama-3.1-8B", 16, ("tensor_model_parallel_size=16",)),  # more ranks than key-value groups
    ],
)
def test_counted_parameters_are_the_real_ones(
    model: str, world_size: int, parallel: tuple[str, ...], process_as_it_was: None
) -> None:
    architecture, config = given(model, *parallel)
    real = built(architecture, config, world_size, log_z=True)
    counted = counted_stages(architecture, config, log_z=True)
    assert [described(stage) for stage in real] == [described(stage) for stage in counted]
    for one, other in zip(real, counted, strict=True):
        assert trainable_bytes(one, config, 2).total == pytest.approx(trainable_bytes(other, config, 2).total)


def test_the_critic_has_a_value_instead_of_a_vocabulary(process_as_it_was: None) -> None:
    architecture, config = given("Qwen2.5-0.5B")
    (real,) = built(architecture, config, 1, value_head=True)
    (counted,) = counted_stages(architecture, config, value_head=True)
    assert described(real) == described(counted)
    assert sorted(p.elements for p in real[0] if p.itemsize == 4) == [1, architecture.hidden_size]


def test_fp8_weights_take_a_byte() -> None:
    architecture, config = given("Qwen2.5-7B")
    fp8 = load_config(None, ["model.path=x", "precision.fp8=hybrid", "precision.fp8_param_gather=true"])
    ((plain,),), ((narrow,),) = counted_stages(architecture, config), counted_stages(architecture, fp8)
    saved = sum(p.elements * p.itemsize for p in plain) - sum(p.elements * p.itemsize for p in narrow)
    assert saved == sum(p.elements for p in plain if p.matrix)


def test_layers_are_shared_out() -> None:
    architecture, config = given(
        "Qwen2.5-7B",
        "pipeline_model_parallel_size=4",
        "num_layers_in_first_pipeline_stage=6",
        "num_layers_in_last_pipeline_stage=4",
    )
    assert layers_of_stages(architecture, config) == [6, 9, 9, 4]
