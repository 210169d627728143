import re

import pytest

from megatron_flowrl.config import (
    METHODS,
    PRESETS,
    Config,
    ParallelConfig,
    UserError,
    check_answers,
    check_config,
    data_parallel_size,
    load_config,
    to_yaml,
)
from megatron_flowrl.config.keys import KEYS

MODEL = "model.path=folder"
COSINE = "optimizer.lr_decay_style=cosine"
HYBRID = "precision.fp8=hybrid"
DELAYED = "precision.fp8_recipe=delayed"
BLOCKWISE = "precision.fp8_recipe=blockwise"
FULL = "recompute.recompute_granularity=full"
SELECTIVE = "recompute.recompute_granularity=selective"
URLS = "generation.urls=[http://127.0.0.1:8000]"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
OVERLAP = "ddp.overlap_param_gather=true"
GRAD_OVERLAP = "ddp.overlap_grad_reduce=true"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        [PP2, VPP2, "parallel.num_layers_in_first_pipeline_stage=4"],
        [PP2, "parallel.num_layers_in_last_pipeline_stage=3"],
        [OVERLAP, GRAD_OVERLAP, "ddp.bucket_size=1000"],
        [
            HYBRID,
            DELAYED,
            "precision.fp8_margin=1",
            "precision.fp8_amax_history_len=16",
            "precision.fp8_param_gather=true",
        ],
        [HYBRID, BLOCKWISE, "precision.first_last_layers_bf16=true", "precision.num_layers_at_end_in_bf16=2"],
        [FULL, "recompute.recompute_method=uniform", "recompute.recompute_num_layers=1"],
        [SELECTIVE, "recompute.recompute_modules=[mlp]"],
        ["reference.placement=host", HYBRID, BLOCKWISE],
        [URLS, "rollout.transfer=gloo", "rollout.dtype=float32"],
        ["rollout.transfer=ipc", "rollout.colocated=true"],
        ["rollout.transfer=disk", "rollout.transfer_folder=x"],
        [COSINE, "optimizer.lr_decay_iters=20", "run.steps=20"],
        [COSINE, "optimizer.lr_decay_iters=20", "run.steps=30", "optimizer.min_lr=1e-9"],
    ],
    ids=" ".join,
)
def test_sound_settings_pass(overrides):
    check_config(load_config(None, [MODEL, *overrides]))


BAD = [
    (
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel = true",
        "tensor_model_parallel_size > 1",
    ),
    ([VPP2], "virtual_pipeline_model_parallel_size = 2", "pipeline_model_parallel_size > 1"),
    (
        ["parallel.num_layers_in_first_pipeline_stage=3"],
        "num_layers_in_first_pipeline_stage = 3",
        "pipeline_model_parallel_size > 1",
    ),
    (
        [PP2, VPP2, "parallel.num_layers_in_last_pipeline_stage=3"],
        "num_layers_in_last_pipeline_stage = 3",
        "multiple of parallel.virtual_pipeline_model_parallel_size = 2",
    ),
    ([OVERLAP], "ddp.overlap_param_gather = true", "ddp.overlap_grad_reduce=true"),
    (
        [OVERLAP, GRAD_OVERLAP, "ddp.use_distributed_optimizer=false"],
        "ddp.overlap_param_gather = true",
        "ddp.use_distributed_optimizer=true",
    ),
    (["rollout.transfer=ipc"], "rollout.transfer = ipc", "rollout.colocated=true"),
    (["rollout.transfer=nccl", "rollout.colocated=true"], "rollout.transfer = nccl", "rollout.transfer=ipc"),
    (["rollout.transfer_folder=x"], "rollout.transfer_folder = x", "rollout.transfer=disk"),
    ([URLS, "rollout.servers=2"], "rollout.servers = 2", "generation.urls names servers that run already"),
    ([URLS, "rollout.first_port=8000"], "rollout.first_port = 8000", "generation.urls names servers"),
    ([URLS, "rollout.quantization=fp8_per_block"], "rollout.quantization = fp8_per_block", "generation.urls names"),
    (["rollout.quantization=fp8_per_tensor", "rollout.dtype=float32"], "quantization = fp8_per_tensor", "bfloat16"),
    (["rollout.replay=x", "rollout.hang_seconds=60"], "rollout.hang_seconds = 60.0 has no effect", "rollout.replay"),
    (["rollout.replay=x", "rollout.max_restarts=0"], "rollout.max_restarts = 0 has no effect", "rollout.replay"),
    (["rollout.replay=x", URLS], "generation.urls = ", "with rollout.replay"),
    (["generation.urls=[localhost]"], "'localhost' is not an address", "http://127.0.0.1:8000"),
    (
        ["generation.urls=[http://a:1,http://a:1]"],
        "generation.urls names a server twice",
        "keep one",
    ),
    (["ddp.bucket_size=9"], "ddp.bucket_size = 9", "ddp.overlap_grad_reduce is false"),
    ([BLOCKWISE], "precision.fp8_recipe = blockwise", "precision.fp8=hybrid"),
    (["precision.fp8_margin=1"], "precision.fp8_margin = 1", "precision.fp8 is null"),
    (["precision.fp8_param_gather=true"], "precision.fp8_param_gather = true", "precision.fp8 is null"),
    (["precision.first_last_layers_bf16=true"], "first_last_layers_bf16 = true", "precision.fp8 is null"),
    ([HYBRID, "precision.dtype=float32"], "precision.fp8 = hybrid", "precision.dtype=bfloat16"),
    (
        [HYBRID, DELAYED, "precision.first_last_layers_bf16=true"],
        "first_last_layers_bf16 = true",
        "tensorwise, blockwise",
    ),
    (
        [HYBRID, BLOCKWISE, "precision.fp8_amax_compute_algo=max"],
        "precision.fp8_amax_compute_algo = max",
        "precision.fp8_recipe=delayed, which is blockwise",
    ),
    (
        [HYBRID, "precision.fp8_param_gather=true", "ddp.use_distributed_optimizer=false"],
        "precision.fp8_param_gather = true",
        "ddp.use_distributed_optimizer=true",
    ),
    (
        ["precision.num_layers_at_start_in_bf16=2"],
        "precision.num_layers_at_start_in_bf16 = 2",
        "precision.first_last_layers_bf16 is false",
    ),
    (
        [FULL, "recompute.recompute_method=block"],
        "recompute_granularity = full",
        "recompute.recompute_num_layers",
    ),
    ([FULL, "recompute.recompute_num_layers=1"], "recompute_granularity = full", "one of uniform, block"),
    ([SELECTIVE, "recompute.recompute_method=block"], "recompute_method = block", "full, which is selective"),
    ([SELECTIVE, "recompute.recompute_num_layers=2"], "recompute_num_layers = 2", "full, which is selective"),
    (["recompute.recompute_method=block"], "recompute.recompute_method = block", "full, which is null"),
    (["recompute.recompute_modules=[mlp]"], 'recompute_modules = ["mlp"]', "selective, which is null"),
    (
        ["reference.placement=host", HYBRID, BLOCKWISE, "precision.fp8_param_gather=true"],
        "reference.placement = host",
        "precision.fp8_param_gather = true",
    ),
    (["reference.placement=host", HYBRID, DELAYED], "reference.placement = host", "precision.fp8_recipe = delayed"),
    (
        [COSINE, "optimizer.lr_decay_iters=20", "run.steps=30"],
        "run.steps = 30: from step 20 on the learning rate is 0",
        "give optimizer.min_lr, or set optimizer.lr_decay_iters=30",
    ),
]


@pytest.mark.parametrize(("overrides", "fact", "cure"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_contradiction_is_named_with_its_cure(overrides, fact, cure):
    with pytest.raises(UserError) as raised:
        check_config(load_config(None, [MODEL, *overrides]))
    (problem,) = raised.value.problems
    assert fact in problem and cure in problem


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.max_model_len=1024"], "generation.max_tokens = 1024 leaves no room"),
        (["rollout.max_model_len=1025", "evaluation.max_tokens=2000"], "evaluation.max_tokens = 2000 leaves no room"),
        (["rollout.max_model_len=1025"], None),
        (["rollout.max_model_len=64", "rollout.replay=x"], None),
    ],
)
def test_a_runs_answers_leave_room_for_a_prompt(overrides, said):
    config = load_config(None, [MODEL, *overrides])
    check_config(config)  # a server alone has no answers
    if said is None:
        check_answers(config)
        return
    with pytest.raises(UserError, match=said):
        check_answers(config)


@pytest.mark.parametrize(("overrides", "fact", "cure"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_the_setting_that_a_message_ends_with_cures(overrides, fact, cure):
    with pytest.raises(UserError) as raised:
        check_config(load_config(None, [MODEL, *overrides]))
    ending = re.search(r" (?:set|or) ([\w.]+)=(\w+|\[.*\])$", str(raised.value))
    if ending is None:  # the cure is a number or an address, which only the user knows
        assert "multiple of" in cure or "raise that" in cure or fact.endswith("= full") or "urls" in str(raised.value)
        return
    key, value = ending.groups()
    kept = [override for override in overrides if override.partition("=")[0] != key]
    check_config(load_config(None, [MODEL, *kept, f"{key}={value}"]))


def test_all_contradictions_are_told_at_once():
    with pytest.raises(UserError) as raised:
        check_config(load_config(None, [VPP2, OVERLAP, BLOCKWISE]))
    assert [problem.split()[0] for problem in raised.value.problems] == [
        "model.path",
        "parallel.virtual_pipeline_model_parallel_size",
        "ddp.overlap_param_gather",
        "precision.fp8_recipe",
    ]


PARALLEL = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=4)


def test_data_parallel_size():
    assert data_parallel_size(PARALLEL, 48) == 2
    assert data_parallel_size(ParallelConfig(), 5) == 5


@pytest.mark.parametrize("world_size", [1, 12, 25])
def test_world_size_that_cannot_be_shared_out_is_refused(world_size):
    with pytest.raises(UserError) as raised:
        data_parallel_size(PARALLEL, world_size)
    for words in (
        f"{world_size} processes",
        "tensor_model_parallel_size 2 ",
        "pipeline_model_parallel_size 3 ",
        "context_parallel_size 4 ",
        "multiple of 24",
    ):
        assert words in str(raised.value)


class TestObjectives:
    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_method_goes_with_every_preset(self, name, preset):
        check_config(load_config(None, ["model.path=x", f"objective.name={name}", f"objective.preset={preset}"]))

    def test_the_schema_says_what_the_preset_scaled_says(self):
        assert load_config(None, ["objective.preset=scaled"]) == Config()
        assert all(KEYS[key].default == value for key, value in PRESETS["scaled"].items())
        assert len({tuple(preset) for preset in PRESETS.values()}) == 1  # each in full

    def test_a_setting_beats_the_preset_and_the_preset_the_default(self, recipe):
        path = recipe("flowrl:\n  beta: 3.0\nobjective:\n  preset: official\n")
        config = load_config(path, ["log_z.dropout=0.0"])
        assert (config.flowrl.beta, config.log_z.dropout) == (3.0, 0.0)
        assert (config.flowrl.reward, config.log_z.prompt_tokens) == ("group_norm", "drop_last")

    def test_a_recipe_written_out_is_the_same_again(self, tmp_path):
        config = load_config(None, ["objective.preset=paper", "objective.name=gspo"])
        (tmp_path / "out.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "out.yaml") == config

    @pytest.mark.parametrize(
        ("overrides", "problem"),
        [
            (["objective.name=grop"], "objective.name = grop is none of flowrl, grpo"),
            (["objective.name=grpo", "flowrl.beta=3"], "flowrl.beta = 3.0 has no effect with objective.name=grpo"),
            (["policy_gradient.clip_low=0.1"], "policy_gradient.clip_low = 0.1 has no effect with objective.name=flow"),
            (["critic.lr=0.1"], "critic.lr = 0.1 has no effect with objective.name=flowrl"),
            (["objective.name=dapo", "critic.lr=0.1"], "critic.lr = 0.1 is read only with policy_gradient.advantage"),
            (["objective.name=ppo", "policy_gradient.balance_coef=2"], "set objective.name=gflownet_ppo"),
            (["objective.name=grpo", "policy_gradient.discount=0.9"], "policy_gradient.discount = 0.9 is read only"),
            (["flowrl.importance_clip=none", "flowrl.importance_max=3"], "flowrl.importance_max = 3.0 is read only"),
            (["flowrl.importance_clip_low=0.1"], "flowrl.importance_clip_low = 0.1 is read only"),
            (["objective.preset=exact", "flowrl.length_exponent=0.5"], "flowrl.length_exponent = 0.5 is read only"),
            (["flowrl.log_z=group", "log_z.lr=0.1"], "log_z.lr = 0.1 is read only with flowrl.log_z=mlp"),
            (["sampler_correction.mode=mask"], "sampler_correction.mode = mask has no effect while"),
            (["sampler_correction.level=token", "sampler_correction.minimum=0.5"], "is read only with sampler_correct"),
            (
                [
                    "sampler_correction.level=token",
                    "sampler_correction.mode=mask",
                    "sampler_correction.minimum=3",
                ],
                "sampler_correction.minimum = 3.0 must be below sampler_correction.maximum = 2.0",
            ),
            (["objective.overlong_buffer=2000"], "objective.overlong_buffer = 2000 is above generation.max_tokens"),
        ],
    )
    def test_what_would_do_nothing_is_refused(self, overrides, problem):
        with pytest.raises(UserError) as raised:
            check_config(load_config(None, ["model.path=x", *overrides]))
        assert any(problem in found for found in raised.value.problems), raised.value.problems

    def test_the_users_own_objective_reads_what_it_likes(self):
        check_config(load_config(None, ["model.path=x", "objective.name=my.own", "critic.lr=1", "flowrl.beta=2"]))
