import re

import pytest

from megatron_flowrl.config import ParallelConfig, UserError, check_config, data_parallel_size, load_config

MODEL = "model.path=folder"
HYBRID = "precision.fp8=hybrid"
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
        [HYBRID, "precision.first_last_layers_bf16=true"],
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
    (["reference.placement=host", HYBRID], "reference.placement = host", "precision.fp8_recipe = delayed"),
]


@pytest.mark.parametrize(("overrides", "fact", "cure"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_contradiction_is_named_with_its_cure(overrides, fact, cure):
    with pytest.raises(UserError) as raised:
        check_config(load_config(None, [MODEL, *overrides]))
    (problem,) = raised.value.problems
    assert fact in problem and cure in problem


@pytest.mark.parametrize(("overrides", "fact", "cure"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_the_setting_that_a_message_ends_with_cures(overrides, fact, cure):
    with pytest.raises(UserError) as raised:
        check_config(load_config(None, [MODEL, *overrides]))
    ending = re.search(r" (?:set|or) ([\w.]+)=(\w+|\[.*\])$", str(raised.value))
    if ending is None:  # the cure is a number or an address, which only the user knows
        assert "multiple of" in cure or fact.endswith("= full") or "generation.urls" in str(raised.value)
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
