"""What is kept of a recipe on few ranks, a step at its true size, and what is made of the small run's numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.config import METHODS, Config, check_config, load_config, to_yaml
from megatron_flowrl.dry_run.ranks import RanksFailed, run_ranks
from megatron_flowrl.dry_run.small import MOST_RANKS, SmallRun, small_run, write_model
from megatron_flowrl.dry_run.step import pack_step
from megatron_flowrl.dry_run.training import DryRunFailed, check_metrics, drawn_record
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.layout import check_layout
from megatron_flowrl.model.packing_rules import packing_rules
from megatron_flowrl.planning import plan as planning
from megatron_flowrl.planning.parameters import counted_stages
from megatron_flowrl.planning.shapes import find_shapes
from megatron_flowrl.planning.workload import Workload
from megatron_flowrl.platform import check_platform, current_platform
from megatron_flowrl.rollout.record import decode
from tests.distributed.ranks import REPOSITORY

PATH = "Qwen/Qwen2.5-32B"
SHAPE = find_shapes(PATH).architecture


def config_of(*overrides: str) -> Config:
    return load_config(None, [f"model.path={PATH}", *overrides])


def small(tmp_path: Path, *overrides: str, replicas: int = 4) -> SmallRun:
    """Made, written, and found to be sound."""
    run = small_run(config_of(*overrides), SHAPE, replicas, tmp_path)
    write_model(run)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "recipe.yaml").write_text(to_yaml(run.config))
    config = load_config(tmp_path / "recipe.yaml")
    assert config == run.config
    check_config(config)
    check_layout(read_architecture(config.model.path), config)
    return run


GATHER = [
    f"{setting}=true" for setting in ("precision.fp8_param_gather", "ddp.overlap_grad_reduce", "rollout.colocated")
]


def layout(tensor: int, stages: int, context: int) -> list[str]:
    sizes = {"tensor_model": tensor, "pipeline_model": stages, "context": context}
    return [f"parallel.{name}_parallel_size={size}" for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("sizes", "kept", "ranks"),
    [
        ((1, 1, 1), (1, 1, 1), 2),
        ((4, 1, 1), (4, 1, 1), 8),
        ((4, 2, 1), (4, 2, 1), 8),
        ((8, 4, 1), (2, 4, 1), 8),
        ((8, 2, 4), (2, 2, 2), 8),
        ((2, 16, 2), (2, 2, 2), 8),
    ],
)
def test_few_ranks_have_every_kind_of_parallelism(
    sizes: tuple[int, int, int], kept: tuple[int, int, int], ranks: int, tmp_path: Path
) -> None:
    run = small(tmp_path, *layout(*sizes))
    parallel = run.config.parallel
    found = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    assert (found, run.ranks) == (kept, ranks) and run.ranks <= MOST_RANKS
    assert (sizes == kept) == (run.notes == ())
    names = ("tensor", "pipeline", "context")
    for name, true, now in zip(names, sizes, kept, strict=True):
        if true != now:
            assert any(name in note and f"{now} instead of {true}" in note for note in run.notes)


def test_stages_keep_their_layers(tmp_path: Path) -> None:
    ends = ["parallel.num_layers_in_first_pipeline_stage=10", "parallel.num_layers_in_last_pipeline_stage=6"]
    run = small(tmp_path, *layout(2, 8, 2), *ends)
    assert run.model["num_hidden_layers"] == 16 and run.config.parallel.pipeline_model_parallel_size == 2
    assert any("16 of the 64 layers" in note for note in run.notes)
    assert (run.model["num_attention_heads"], run.model["num_key_value_heads"]) == (40, 8)


def test_what_only_a_gpu_has_is_left_out_and_told(tmp_path: Path) -> None:
    run = small(tmp_path, "rollout.quantization=fp8_per_tensor", "precision.fp8=hybrid", *GATHER)
    assert run.config.rollout.quantization is None and not run.config.precision.fp8_param_gather
    told = "precision.fp8_param_gather = true, rollout.quantization = fp8_per_tensor"
    assert run.notes == (f"left out, as it needs a GPU: {told}",)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8", "delayed"])
@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 1, 4), (1, 1, 8)])
def test_fp8_is_kept(recipe: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    fp8 = ["precision.fp8=e4m3", f"precision.fp8_recipe={recipe}", *layout(*sizes)]
    run = small(tmp_path, *fp8, "recompute.recompute_granularity=selective", "recompute.recompute_modules=[core_attn]")
    assert (run.config.precision.fp8, run.config.precision.fp8_recipe, run.notes) == ("e4m3", recipe, ())
    assert run.config.recompute.recompute_granularity == "selective"
    longest = packing_rules(run.config, read_architecture(run.config.model.path), 1).longest_sequence
    assert longest == run.config.data.tokens_per_micro_batch
    check_platform(run.config, current_platform())
    again = [*fp8, "recompute.recompute_granularity=selective", "recompute.recompute_modules=[mlp]"]
    run = small(tmp_path / "again", *again)
    assert (recipe == "delayed") == any("recompute.recompute_granularity = selective" in note for note in run.notes)
    check_platform(run.config, current_platform())


def test_layers_in_bf16_are_no_more_than_a_stage_has(tmp_path: Path) -> None:
    ends = ["parallel.num_layers_in_first_pipeline_stage=2", "parallel.num_layers_in_last_pipeline_stage=2"]
    kept = ["precision.first_last_layers_bf16=true", "precision.num_layers_at_start_in_bf16=5"]
    run = small(tmp_path, *layout(4, 12, 1), *ends, "precision.fp8=e4m3", *kept)
    assert run.config.precision.num_layers_at_start_in_bf16 == 4 == run.model["num_hidden_layers"] // 4


@pytest.mark.parametrize("name", METHODS)
def test_what_the_method_reads_is_kept(name: str, tmp_path: Path) -> None:
    run = small(tmp_path, f"objective.name={name}", "reference.placement=host", "optimizer.lr=0.5")
    true = config_of(f"objective.name={name}", "reference.placement=host", "optimizer.lr=0.5")
    for section in ("objective", "flowrl", "log_z", "policy_gradient", "critic", "optimizer", "reference", "ddp"):
        assert getattr(run.config, section) == getattr(true, section)


def test_drawn_answers_are_a_record(tmp_path: Path) -> None:
    config = small(tmp_path).config
    record = drawn_record(config, 2)
    again = decode(record.encode(), "there")
    assert again.sequences == record.sequences == drawn_record(config, 2).sequences != drawn_record(config, 1).sequences
    assert again.prompts == config.run.prompts_per_step and {*again.rewards} == {0.0, 1.0}
    again.check_tokens(515, "there")


def test_a_step_at_its_true_size() -> None:
    config = config_of("run.prompts_per_step=64", "generation.max_tokens=8192", *layout(4, 2, 1))
    packed = pack_step(config, SHAPE, 4, Workload(256, 4096))
    assert packed.packing.num_sequences(0) == 256 and len(packed.packing.mini_batches) == 2
    micro_batches = packed.packing.num_micro_batches(0)
    assert packed.idle_share == pytest.approx(1 / (micro_batches + 1), rel=0.2)
    lengths = [length for batch in packed.packing.micro_batches for length in batch.lengths]
    assert max(lengths) == 256 + 8192 and sum(lengths) / len(lengths) == pytest.approx(256 + 4096, rel=0.01)


def test_a_plan_foresees_the_same_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 32B recipe: as many of them, and as long a wait."""
    monkeypatch.setattr(planning, "real_stages", lambda shape, config, _, log_z: counted_stages(shape, config))
    monkeypatch.setattr(planning, "better_layouts", lambda config, setting, given: [])
    config = load_config(REPOSITORY / "examples" / "math" / "qwen2.5_32b.yaml")
    found = planning.make_plan(config, planning.Options(gpus=32))
    packed = pack_step(config, SHAPE, 4, found.setting.workload)
    counts = {packed.packing.num_micro_batches(m) for m in range(len(packed.packing.mini_batches))}
    assert counts == {found.estimate.micro_batches}
    assert packed.idle_share == pytest.approx(found.estimate.bubble)


GOOD: list[dict[str, Any]] = [
    {
        "step": step,
        "update/loss": 1.5,
        "update/grad_norm": 2.0,
        "update/first_weight_max": 1.0,
        "update/first_kl_old": 0.0,
        "update/first_kl_reference": 0.01 * (step - 1),
        "update/skipped_updates": 0.0,
    }
    for step in (1, 2)
]


@pytest.mark.parametrize(
    ("step", "change", "problem"),
    [
        (1, {"update/first_weight_max": 1.25}, "step 1: update/first_weight_max is 1.25, and not 1"),
        (2, {"update/first_kl_old": 1e-9}, "step 2: update/first_kl_old is 1e-09, and not 0"),
        (1, {"update/first_kl_reference": 1e-9}, "step 1: update/first_kl_reference is 1e-09"),
        (2, {"update/loss": float("nan")}, "step 2: update/loss is nan"),
        (2, {"update/grad_norm": float("inf")}, "step 2: update/grad_norm is inf"),
        (1, {"update/skipped_updates": 1.0}, "step 1: update/skipped_updates is 1.0"),
        (2, {"step": 3}, "metrics.jsonl has the steps [1, 3]"),
    ],
)
def test_numbers_that_cannot_be_right(step: int, change: dict[str, Any], problem: str) -> None:
    check_metrics(GOOD)
    check_metrics([line | {"update/first_weight_max": 1.5} for line in GOOD], exact=False)
    lines = [line | change if line["step"] == step else line for line in GOOD]
    with pytest.raises(DryRunFailed) as raised:
        check_metrics(lines)
    assert any(told.startswith(problem) for told in raised.value.problems)


def test_a_rank_that_fails_or_hangs_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    def work() -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("this one")
        import time

        time.sleep(60)

    with pytest.raises(RanksFailed, match=r"(?s)rank 1 failed.*ValueError: this one"):
        run_ranks(work, 2, tmp_path / "one", timeout=1.0)
    with pytest.raises(RanksFailed, match="rank 0 did not end in 1 s"):
        run_ranks(lambda: __import__("time").sleep(60), 1, tmp_path / "two", timeout=1.0)
    assert run_ranks(lambda: print(os.environ["WORLD_SIZE"]), 3, tmp_path / "three", timeout=60.0) == "3\n"
