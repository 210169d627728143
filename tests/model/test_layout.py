"""Which layouts fit which model: by rule, in words, and against Megatron's own judgement."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_flowrl.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    UserError,
    check_config,
)
from megatron_flowrl.model.architecture import Architecture, architecture_of
from megatron_flowrl.model.layout import check_layout, max_sequence_length, padded_vocab_size
from megatron_flowrl.model.transformer_config import transformer_config
from megatron_flowrl.platform import Libraries, Platform
from tests.tiny_models import MODELS

# 8 heads in 4 groups, 64 wide; feed-forward 96; 8 layers; 512 tokens: every FP8 product is a multiple of 16 at TP 2.
MODEL = replace(
    architecture_of(MODELS["qwen3"]),
    hidden_size=64,
    num_layers=8,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=16,
    ffn_hidden_size=96,
)
CPU = Platform(torch.device("cpu"), "gloo", Libraries("", "", None, None, False, None))


def parallel(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    first: int | None = None,
    last: int | None = None,
    **others: Any,
) -> Config:
    return Config(
        model=ModelConfig(path="somewhere"),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        ),
        **others,
    )


def bf16_layers(start: int, end: int, *, pp: int = 1) -> Config:
    precision = PrecisionConfig(
        fp8="e4m3",
        fp8_recipe="tensorwise",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=start,
        num_layers_at_end_in_bf16=end,
    )
    return parallel(pp=pp, precision=precision)


def recomputed(method: Any, layers: int, **layout: Any) -> Config:
    settings = RecomputeConfig(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)
    return parallel(**layout, recompute=settings)


def problems(architecture: Architecture, config: Config) -> tuple[str, ...]:
    try:
        check_layout(architecture, config)
    except UserError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    "config",
    [
        parallel(),
        parallel(tp=2),
        parallel(tp=4),
        parallel(tp=8),  # two ranks a group
        parallel(pp=2),
        parallel(pp=8),
        parallel(pp=2, vpp=4),
        parallel(pp=4, vpp=2),
        parallel(pp=2, first=3),
        parallel(pp=2, last=1),
        parallel(pp=2, first=3, last=5),
        parallel(pp=4, first=1, last=3),
        parallel(pp=3, first=4, vpp=2),
        parallel(pp=4, first=2, last=2, vpp=2),
        recomputed("uniform", 8),
        recomputed("block", 3),
        bf16_layers(4, 4),
        Config(model=ModelConfig(path="somewhere", max_sequence_length=512)),
    ],
)
def test_layouts_that_fit(config: Config) -> None:
    check_config(config)
    assert problems(MODEL, config) == ()
    assert megatron_accepts(MODEL, config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (parallel(tp=3), ["tensor_model_parallel_size = 3", "num_attention_heads = 8", "a divisor of 8"]),
        (parallel(tp=3), ["tensor_model_parallel_size = 3", "num_key_value_heads = 4"]),
        (parallel(tp=64), ["tensor_model_parallel_size = 64", "intermediate_size = 96"]),
        (parallel(pp=3), ["pipeline_model_parallel_size = 3", "8 layers"]),
        (parallel(pp=16), ["pipeline_model_parallel_size = 16", "8 layers"]),
        (parallel(pp=2, vpp=3), ["virtual_pipeline_model_parallel_size = 3", "4 layers"]),
        (parallel(pp=4, first=1, vpp=2), ["num_layers_in_first_pipeline_stage", "1 layers on the first", "7 of"]),
        (parallel(pp=3, first=4, vpp=4), ["virtual_pipeline_model_parallel_size = 4", "2 layers"]),
        (parallel(pp=2, first=3, last=4), ["3 layers on the first stage and 4 on the last", "1 of the model's 8"]),
        (parallel(pp=2, first=8), ["8 layers on the first stage", "leave 0 of the model's 8 layers for 1 stages"]),
        (parallel(pp=2, last=9), ["9 on the last", "leave -1 of"]),
        (parallel(pp=4, first=3, last=4), ["leave 1 of the model's 8 layers for 2 stages"]),
        (parallel(pp=3, first=4, last=4), ["leave 0 of the model's 8 layers for 1 stages"]),
        (parallel(pp=3, last=3), ["an even share of layers on the first stage and 3 on the last", "5 of"]),
        (recomputed("block", 9), ["recompute.recompute_num_layers = 9", "above the 8 layers"]),
        (bf16_layers(5, 4), ["num_layers_at_start_in_bf16 + num_layers_at_end_in_bf16 = 9", "8 layers"]),
        (
            Config(model=ModelConfig(path="somewhere", max_sequence_length=513)),
            ["model.max_sequence_length = 513", "512 tokens"],
        ),
    ],
)
def test_layouts_that_do_not_fit(config: Config, named: list[str]) -> None:
    found = problems(MODEL, config)
    assert any(all(part in problem for part in named) for problem in found), found


def test_all_problems_are_told_at_once() -> None:
    """Of the layout first; what depends on the layers of a stage once these are known."""
    found = "\n".join(problems(MODEL, parallel(tp=5, pp=3)))
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "8 layers"):
        assert name in found


@pytest.mark.parametrize("change", [{"hidden_size": 72}, {"ffn_hidden_size": 72}, {"head_dim": 9}])
def test_fp8_products_are_multiples_of_16_on_each_rank(change: dict[str, int]) -> None:
    """64 and 96 are, and half of 96 is; 72 and 4 heads of 9 are not."""
    config = parallel(tp=2, precision=PrecisionConfig(fp8="hybrid"))
    assert problems(MODEL, config) == ()
    found = problems(replace(MODEL, **change), config)
    assert found and all("precision.fp8 = hybrid" in problem and "multiple of 16" in problem for problem in found)
    assert problems(replace(MODEL, **change), parallel(tp=2)) == ()


def test_the_longest_sequence_is_the_models_unless_one_is_set() -> None:
    assert max_sequence_length(MODEL, Config()) == 512
    assert max_sequence_length(MODEL, Config(model=ModelConfig(max_sequence_length=100))) == 100


@pytest.mark.parametrize(("tp", "expected"), [(1, 384), (2, 512), (4, 512), (3, 384)])
def test_padded_vocabulary(tp: int, expected: int) -> None:
    assert padded_vocab_size(299, 128, tp) == expected
    assert padded_vocab_size(expected, 128, tp) == expected


def megatron_accepts(architecture: Architecture, config: Config) -> bool:
    """Whether Megatron takes the settings and its pipeline chunks, one layer or more each, hold all layers."""
    try:
        settings = transformer_config(architecture, config, CPU)
        pp, vpp = settings.pipeline_model_parallel_size, settings.virtual_pipeline_model_parallel_size
        stages: list[int | None] = [None] if vpp is None else list(range(vpp))
        layers = [
            get_num_layers_to_build(settings, vp_stage=stage, pp_rank=rank) for rank in range(pp) for stage in stages
        ]
    except (AssertionError, ValueError):
        return False
    return min(layers) > 0 and sum(layers) == settings.num_layers


def pipelines() -> Iterator[tuple[int, Config]]:
    """Layouts whose settings do not contradict one another."""
    counts = (None, 1, 2, 3)
    for layers, pp, vpp, first, last in itertools.product(range(1, 9), range(1, 5), (None, 2, 3), counts, counts):
        config = parallel(pp=pp, vpp=vpp, first=first, last=last)
        try:
            check_config(config)
        except UserError:
            continue
        yield layers, config


def test_pipelines_are_judged_as_megatron_does() -> None:
    judgements = []
    for layers, config in pipelines():
        architecture = replace(MODEL, num_layers=layers)
        judgements.append(not problems(architecture, config))
        assert judgements[-1] == megatron_accepts(architecture, config), f"{layers} layers, {config.parallel}"
    assert judgements.count(True) > 50 and judgements.count(False) > 50


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_heads_are_judged_as_megatron_does(groups: int) -> None:
    architecture = replace(MODEL, num_attention_heads=12, num_query_groups=groups, ffn_hidden_size=5 * 7 * 96)
    for tp in range(1, 13):
        config = parallel(tp=tp)
        assert (not problems(architecture, config)) == megatron_accepts(architecture, config), f"TP {tp}"


@pytest.mark.parametrize(
    "config",
    [
        bf16_layers(4, 4, pp=2),
        pytest.param(
            bf16_layers(6, 1, pp=2),
        ),
        pytest.param(
            bf16_layers(0, 5, pp=2),
        ),
    ],
)
def test_what_passes_for_bf16_layers_megatron_takes(config: Config) -> None:
    check_config(config)
    assert problems(MODEL, config) or megatron_accepts(MODEL, config)


@pytest.mark.parametrize("config", [recomputed("uniform", 3), recomputed("uniform", 8, pp=2)])
def test_uniform_recomputation_has_to_divide_the_layers_of_a_chunk(config: Config) -> None:
    check_config(config)
    assert any("recompute.recompute_num_layers" in problem for problem in problems(MODEL, config))
