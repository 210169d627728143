"""The model of time: what it has to say of layouts, of servers, and of a step."""

from __future__ import annotations

import pytest

from megatron_flowrl.config import Config, Sizes, load_config
from megatron_flowrl.data.packing import PackingRules
from megatron_flowrl.model.objective import build_objective
from megatron_flowrl.observe.flops import TransformerSize, training_flops
from megatron_flowrl.planning.compute import Machine, PassTime, pass_time
from megatron_flowrl.planning.estimate import Estimate, Setting, estimate, num_servers
from megatron_flowrl.planning.hardware import peak, read_hardware
from megatron_flowrl.planning.memory import sampler_memory
from megatron_flowrl.planning.sampling import Sampling, sampling
from megatron_flowrl.planning.shapes import find_shapes
from megatron_flowrl.planning.workload import RankLoad, Workload, mini_batch_load, response_lengths

QWEN, HARDWARE = find_shapes("Qwen2.5-7B").architecture, read_hardware()
GPU = HARDWARE.gpu("H100")
LOAD = RankLoad(tokens=8 * 16384, pairs=8 * 4 * 4096.0**2, labels=8 * 16384, micro_batches=8)


def configured(*settings: str) -> Config:
    return load_config(None, ["model.path=x", *settings])


def passed(*settings: str, training: bool = True, load: RankLoad = LOAD) -> PassTime:
    return pass_time(QWEN, configured(*settings), Machine(HARDWARE, GPU, 8, 1), load, training=training)


def test_a_pass_has_the_operations_of_observe_flops() -> None:
    """The output's fourth product is not one of the model's."""
    size = TransformerSize(hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944, vocab=152064, head_dim=128)
    model = training_flops(size, [4096] * 32)
    output = 2 * 3584 * 152064 * LOAD.labels
    efficiency = HARDWARE.efficiency
    attention = training_flops(size, [4096] * 32) - training_flops(size, [1] * 131072)
    others = model - attention + output
    rate = peak(GPU, "bfloat16")
    expected = (others / (rate * efficiency.bfloat16) + attention / (rate * efficiency.attention)) / efficiency.busy
    assert passed().seconds == pytest.approx(expected, rel=1e-3)


def test_a_pipeline_has_a_bubble_that_chunks_and_micro_batches_make_smaller() -> None:
    four = passed("parallel.pipeline_model_parallel_size=4")
    assert four.bubble / four.stage == pytest.approx(3 / 8)
    chunks = passed("parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=7")
    assert chunks.bubble / chunks.stage == pytest.approx(3 / 56)
    assert passed().bubble == 0


def test_recomputation_costs_what_it_repeats() -> None:
    plain, forward = passed().seconds, passed(training=False).seconds
    full = passed(
        "recompute.recompute_granularity=full",
        "recompute.recompute_method=uniform",
        "recompute.recompute_num_layers=1",
    ).seconds
    attention = passed("recompute.recompute_granularity=selective").seconds
    assert plain < attention < full < plain + forward
    assert 2.9 < plain / forward < 3.3


def test_tensor_parallelism_is_not_free() -> None:
    one, two = passed(), passed("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    assert one.communication == 0 < two.communication
    assert one.seconds / 2 < two.seconds < one.seconds


@pytest.mark.parametrize(("mean", "longest"), [(300, 4096), (3000, 4096), (4096, 4096), (1, 10)])
def test_lengths_have_the_mean_that_is_asked_for(mean: int, longest: int) -> None:
    lengths = response_lengths(512, mean, longest, 0.7)
    assert list(lengths) == sorted(lengths) and lengths[0] >= 1 and lengths[-1] <= longest
    assert sum(lengths) / 512 == pytest.approx(mean, rel=0.03, abs=1)


def test_a_large_mini_batch_is_sampled() -> None:
    rules = PackingRules(data_parallel_size=4, tokens_per_micro_batch=8192)
    small, large = (mini_batch_load(response_lengths(count, 1000, 4096, 0.7), 100, rules) for count in (4096, 3 * 4096))
    assert large.tokens == pytest.approx(3 * small.tokens, rel=0.02)
    assert large.micro_batches == pytest.approx(3 * small.micro_batches, rel=0.05)


def sampled(lengths: list[int], *settings: str) -> Sampling:
    config = configured("rollout.max_num_seqs=64", *settings)
    memory = sampler_memory(QWEN, config, HARDWARE, GPU.memory)
    return sampling(QWEN, config, Machine(HARDWARE, GPU, 8, 1), memory, lengths, 100)


def test_decoding_is_bound_by_the_weights_that_are_read() -> None:
    alone = sampled([1000])
    read = 2 * 7_615_616_512 / (GPU.bandwidth * HARDWARE.efficiency.bandwidth)
    assert alone.decode == pytest.approx(1000 * (read + HARDWARE.sampler.step_milliseconds / 1e3), rel=0.01)
    assert sampled([1000] * 32).decode < 1.5 * alone.decode
    assert sampled([1000] * 128).decode > 2 * alone.decode  # 64 at a time


def test_the_longest_answer_decides() -> None:
    assert sampled([100] * 31 + [8000]).decode > 5 * sampled([100] * 32).decode
    assert sampled([100] * 31 + [8000]).concurrency < 2


def estimated(*settings: str, world: int = 8) -> Estimate:
    config = configured("rollout.colocated=true", "generation.max_tokens=4096", *settings)
    sizes = Sizes(world // 8, 0, 8)
    needs = build_objective(config).needs
    return estimate(config, Setting(QWEN, needs, HARDWARE, GPU, sizes, Workload(200, 1500)))


def test_phases_are_those_of_the_loop() -> None:
    on_policy = estimated("run.prompts_per_step=32")
    assert "old_log_probs" not in on_policy.seconds and on_policy.seconds["reference_log_probs"] > 0
    assert "old_log_probs" in estimated("run.prompts_per_step=64").seconds
    assert "old_log_probs" in estimated("run.prompts_per_step=32", "objective.force_old_pass=true").seconds
    assert "reference_log_probs" not in estimated("flowrl.reference=none").seconds
    ppo = estimated("objective.name=ppo")
    assert ppo.seconds["values"] > 0 and ppo.seconds["critic"] > 0 and ppo.fullest.kinds["critic"] > 0
    assert estimated("rollout.replay=somewhere").seconds["rollout"] == 0


def test_a_critic_has_no_output_over_the_vocabulary() -> None:
    ppo = estimated("objective.name=ppo", "run.prompts_per_step=64").seconds
    labels = "data.tokens_per_micro_batch=16384"
    assert 0 < ppo["values"] < ppo["old_log_probs"] and ppo["critic"] < ppo["update"] + ppo["optimizer"]
    with_output = passed(labels, training=False)
    without = pass_time(QWEN, configured(labels), Machine(HARDWARE, GPU, 8, 1), LOAD, training=False, output=False)
    products = 2 * QWEN.hidden_size * QWEN.vocab_size * LOAD.labels
    rate = peak(GPU, "bfloat16") * HARDWARE.efficiency.bfloat16 * HARDWARE.efficiency.busy
    assert with_output.seconds - without.seconds == pytest.approx(products / rate)


def test_more_gpus_take_less_time() -> None:
    few, many = estimated(), estimated(world=16)
    assert many.seconds["update"] < 0.7 * few.seconds["update"]
    assert many.seconds["rollout"] < few.seconds["rollout"]
    assert many.fullest.kinds["optimizer"] == few.fullest.kinds["optimizer"] / 2


def test_servers_of_a_run() -> None:
    assert num_servers(configured("rollout.servers=4", "rollout.colocated=true"), Sizes(3, 0, 8)) == 12
    assert num_servers(configured("rollout.servers=4"), Sizes(3, 2, 8)) == 8
    assert num_servers(configured("generation.urls=[http://a:1, http://b:1]"), Sizes(3, 0, 8)) == 2
    assert num_servers(configured("rollout.replay=x"), Sizes(3, 0, 8)) == 0
