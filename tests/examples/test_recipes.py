"""The paper's recipes: as published, sound, packed and cut as they say; and one wrong value at a time is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl import cli
from megatron_flowrl.cli import TRAIN_SECTIONS
from megatron_flowrl.config import Config, PrecisionConfig, check_config, data_parallel_size, load_config
from megatron_flowrl.dry_run import __main__ as command
from megatron_flowrl.dry_run.layout import check_ranks
from megatron_flowrl.dry_run.step import pack_step
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.planning import plan as planning
from megatron_flowrl.planning.hardware import read_hardware
from megatron_flowrl.planning.parameters import Stage, counted_stages
from megatron_flowrl.planning.refusals import Accepted, Cluster, check_run
from megatron_flowrl.planning.shapes import published_models
from megatron_flowrl.planning.workload import assumed
from megatron_flowrl.rollout.server import VllmServer
from tests.distributed.ranks import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
MATH_7B, MATH_32B = EXAMPLES / "math" / "qwen2.5_7b.yaml", EXAMPLES / "math" / "qwen2.5_32b.yaml"
CODE_7B = EXAMPLES / "code" / "r1_distill_qwen_7b.yaml"
GPUS = {MATH_7B: 8, MATH_32B: 32, CODE_7B: 8}
METHODS = sorted((EXAMPLES / "math" / "methods").glob("*.yaml"))
BOTH = [
    (path, gpus) for plain, gpus in GPUS.items() for path in (plain, plain.with_name(f"{plain.stem}_fp8.yaml"))
]  # fmt: skip
ALL = [*BOTH, *((path, 8) for path in METHODS)]
# The overrides that examples/math/README.md has.
ABLATIONS = [
    *([f"flowrl.beta={beta}"] for beta in (5, 10, 30)),
    ["flowrl.importance_level=none"],
    [
        "objective.name=gflownet_ppo",
        "parallel.tensor_model_parallel_size=4",
        "rollout.extra_arguments=[--gpu-memory-utilization, '0.35']",
    ],
    *([f"objective.preset={preset}"] for preset in ("official", "exact", "scaled")),
    ["flowrl.log_z=group"],
    ["sampler_correction.level=token"],
]
PPO_ON_32B = [
    "objective.name=ppo",
    "parallel.tensor_model_parallel_size=8",
    "parallel.pipeline_model_parallel_size=4",
    "parallel.num_layers_in_first_pipeline_stage=null",
    "parallel.num_layers_in_last_pipeline_stage=null",
]


def loaded(recipe: Path, *overrides: str) -> Config:
    config = load_config(recipe, overrides, TRAIN_SECTIONS, "train")
    check_config(config)
    return config


def accepted(config: Config, gpus: int) -> Accepted:
    return check_run(config, Cluster(gpus), assumed(config, None, None))


@pytest.mark.parametrize(("recipe", "gpus"), ALL, ids=lambda value: getattr(value, "stem", value))
def test_it_parses_fits_its_model_and_packs(recipe: Path, gpus: int) -> None:
    assert len(recipe.read_text().splitlines()) < 100
    config = loaded(recipe)
    found = accepted(config, gpus)
    replicas = found.replicas
    packing = pack_step(config, found.shapes.architecture, replicas, assumed(config, None, None)).packing
    assert replicas in (2, 4) and packing.efficiency > 0.95
    assert len(packing.mini_batches) == config.run.prompts_per_step // config.run.prompts_per_mini_batch
    servers = config.rollout.servers * config.rollout.tensor_parallel_size
    assert servers == 8 and config.rollout.colocated


@pytest.mark.parametrize("recipe", [path for path, _ in BOTH], ids=lambda path: path.stem)
def test_the_settings_are_those_that_are_published(recipe: Path) -> None:
    config, in_math = loaded(recipe), recipe.parent.name == "math"
    assert Path(config.model.path).name in published_models() and config.objective.preset == "paper"
    flowrl, optimizer = config.flowrl, config.optimizer
    assert (flowrl.beta, flowrl.reward, flowrl.length_normalization) == (15.0, "group_norm", "log_probs")
    assert (flowrl.importance_level, flowrl.log_z, flowrl.reference) == ("sum", "mlp", "reference")
    sizes = (config.run.prompts_per_step, config.run.prompts_per_mini_batch, config.generation.n)
    assert sizes == (512 if in_math else 64, 32, 8)
    assert (config.prompts.max_tokens, config.generation.max_tokens) == (2048, 8192)
    assert config.log_prob.temperature == (1.0 if in_math else 0.6)
    assert (optimizer.lr, optimizer.lr_warmup_iters, optimizer.lr_decay_style) == (1e-6, 10, "constant")
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
    rollout_tp = {"qwen2.5_7b": 1, "qwen2.5_32b": 4, "r1_distill_qwen_7b": 2}[recipe.stem.removesuffix("_fp8")]
    assert config.rollout.tensor_parallel_size == rollout_tp
    held_out = config.evaluation
    assert (held_out.n, held_out.temperature, held_out.top_p) == (16, 0.6, 0.95)


@pytest.mark.parametrize("plain", list(GPUS), ids=lambda path: path.stem)
def test_fp8_differs_in_fp8_alone(plain: Path, tmp_path: Path) -> None:
    config = loaded(plain.with_name(f"{plain.stem}_fp8.yaml"))
    assert (config.precision.fp8, config.precision.fp8_recipe) == ("e4m3", "blockwise")
    assert config.precision.first_last_layers_bf16 and config.rollout.quantization == "fp8_per_block"
    # and in what the sampler may take, beside the copies of weights that FP8 products have
    assert config.rollout.extra_arguments[0] == loaded(plain).rollout.extra_arguments[0] == "--gpu-memory-utilization"
    rollout = replace(config.rollout, quantization=None, extra_arguments=loaded(plain).rollout.extra_arguments)
    assert replace(config, precision=PrecisionConfig(), rollout=rollout) == loaded(plain)
    server = VllmServer(config.rollout, tmp_path, tmp_path / "log", port=4321).command()
    assert dict(itertools.pairwise(server))["--quantization"] == "fp8_per_block"


@pytest.mark.parametrize("overrides", ABLATIONS, ids=" ".join)
def test_ablations(overrides: list[str]) -> None:
    config = loaded(MATH_7B, *overrides)
    assert config != loaded(MATH_7B)
    accepted(config, 8)


@pytest.mark.parametrize(
    ("recipe", "gpus", "overrides"),
    [
        *((recipe, gpus, []) for recipe, gpus in ALL),
        *((MATH_7B, 8, overrides) for overrides in ABLATIONS),
        (MATH_32B, 32, PPO_ON_32B),
    ],
    ids=lambda value: getattr(value, "stem", " ".join(value) if isinstance(value, list) else value),
)
def test_it_fits_by_its_plan_with_room_to_spare(
    recipe: Path, gpus: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted parameters: tests/planning has that the real model's are the same."""

    def counted(architecture: Architecture, config: Config, world: int, *, log_z: bool) -> list[Stage]:
        return counted_stages(architecture, config, log_z=log_z)

    monkeypatch.setattr(planning, "real_stages", counted)
    monkeypatch.setattr(planning, "better_layouts", lambda config, setting, given: [])
    found = planning.make_plan(loaded(recipe, *overrides), planning.Options(gpus=gpus)).estimate
    assert found.problems == () and found.sampler is not None
    room = read_hardware().gpu("H100").memory
    assert max(rank.resident for rank in found.stages) + found.sampler.limit < 0.97 * room
    assert found.fullest.total < 0.9 * room


def test_methods_and_what_the_critic_needs() -> None:
    names = {path.stem: loaded(path).objective.name for path in METHODS}
    assert names == {name: name for name in ("grpo", "ppo", "reinforce_plus_plus")}
    for name in ("grpo", "reinforce_plus_plus"):
        for recipe in (MATH_32B, CODE_7B):
            accepted(loaded(recipe, f"objective.name={name}"), GPUS[recipe])
    config = loaded(MATH_32B, *PPO_ON_32B)
    assert data_parallel_size(config.parallel, 32) == 1
    accepted(config, 32)


@pytest.mark.parametrize("recipe", [MATH_7B, MATH_32B], ids=lambda path: path.stem)
def test_the_ranks_hold_every_parameter_once_at_its_true_size(recipe: Path) -> None:
    config = loaded(recipe)
    architecture = accepted(config, GPUS[recipe]).shapes.architecture
    parts = check_ranks(config, architecture, GPUS[recipe], log_z=True)
    assert len(parts.pieces) == 12 * architecture.num_layers + 3
    assert 0.9 < min(parts.parameters) / max(parts.parameters) <= 1


# Each with the words that its refusal must have; the first is the key.
WRONG = [
    ("seed=-1", ["int >= 0"]),
    ("run.steps=0", ["int > 0"]),
    ("run.prompts_per_step=500", ["no multiple of run.prompts_per_mini_batch = 32"]),
    ("run.prompts_per_mini_bach=32", ["did you mean run.prompts_per_mini_batch"]),
    ("run.hang_seconds=600", ["parallel.distributed_timeout_minutes"]),
    ("model.path=''", ["empty"]),
    ("model.init=none", ["pretrained, random"]),
    ("parallel.sequence_parallel=yes", ["true or false"]),
    ("parallel.virtual_pipeline_model_parallel_size=1", ["int >= 2"]),
    ("ddp.use_distributed_optimizer=false", ["ddp.overlap_param_gather"]),
    ("precision.fp8=e5m2", ["e4m3, hybrid"]),
    ("precision.fp8_recipe=blockwise", ["precision.fp8 is null"]),
    ("recompute.recompute_modules=[moe]", ["core_attn, mlp"]),
    ("recompute.recompute_num_layers=1", ["recompute_granularity=full"]),
    ("optimizer.lr=fast", ["float >= 0"]),
    ("optimizer.lr_decay_style=exponential", ["constant, linear, cosine"]),
    ("optimizer.min_lr=1e-7", ["lr_decay_style is constant"]),
    ("optimizer.weight_deacy=0.1", ["did you mean optimizer.weight_decay"]),
    ("objective.name=flowl", ["none of flowrl, grpo"]),
    ("objective.preset=papers", ["paper, official"]),
    ("objective.overlong_buffer=9000", ["above generation.max_tokens = 8192"]),
    ("flowrl.beta=0", ["float > 0"]),
    ("flowrl.importance_clip=two-sided", ["none, max, two_sided"]),
    ("flowrl.importance_max=5.0", ["flowrl.importance_clip=max"]),
    ("log_z.dropout=1.0", ["< 1"]),
    ("critic.lr=1e-4", ["objective.name=flowrl"]),
    ("log_prob.temperature=0", ["float > 0"]),
    ("reference.placement=cpu", ["resident, host"]),
    ("rollout.transfer=nccl", ["rollout.colocated"]),
    ("rollout.quantization=int4", ["fp8_per_tensor, fp8_per_block"]),
    ("generation.n=0", ["int > 0"]),
    ("generation.max_tokens=16384", ["rollout.max_model_len = 10240"]),
    ("evaluation.top_p=1.5", ["<= 1"]),
    ("prompts.template=think", ["{prompt}"]),
    ("checkpoint.save_intervall=5", ["did you mean checkpoint.save_interval"]),
]
# These need the model's shape, or the number of ranks.
WRONG_TOGETHER = [
    ("parallel.tensor_model_parallel_size=3", ["does not divide the 8 GPUs of a node"]),
    ("parallel.tensor_model_parallel_size=16", ["more than the 8 GPUs of a node", "num_attention_heads = 40"]),
    ("parallel.context_parallel_size=3", ["multiple of 24"]),
    ("parallel.num_layers_in_first_pipeline_stage=32", ["leave 1 of the model's 64 layers"]),
    ("data.tokens_per_micro_batch=8192", ["8448 tokens"]),
    ("model.max_sequence_length=200000", ["131072"]),
    ("rollout.tensor_parallel_size=3", ["num_attention_heads = 40"]),
    ("rollout.max_model_len=200000", ["131072"]),
    ("rollout.servers=16", ["take 64 GPUs, and a node has 8"]),
    ("rollout.transfer=shm", ["moves weights between CPUs"]),
    ("reward.grader=answer_matches", ["did you mean 'answer_match'"]),
    ("model.path=Qwen/Qwen3-0.1B", ["is no folder"]),
]


def key_of(override: str) -> str:
    return override.partition("=")[0]


@pytest.fixture(autouse=True)
def nothing_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is built is too late for a refusal."""

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(command, "check_ranks", built)


def shown(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("override", "words"), [*WRONG, *WRONG_TOGETHER], ids=shown)
def test_a_wrong_value_is_refused_by_its_name(
    override: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([str(MATH_32B), "--gpus", "32", "--layout-only", override])
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert all(word in said for word in [key_of(override), *words]), said


@pytest.mark.parametrize(("override", "words"), WRONG, ids=shown)
def test_train_refuses_it_too(
    override: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(MATH_32B), f"run.folder={tmp_path / 'run'}", override])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and not (tmp_path / "run").exists()
    assert all(word in said for word in [key_of(override), *words]), said
