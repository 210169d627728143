"""Bytes by kind, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_flowrl.checkpoint.stream import BUCKET_BYTES
from megatron_flowrl.config import Config, load_config
from megatron_flowrl.planning.activations import (
    Activations,
    MicroBatch,
    chunks_in_flight,
    layer_parts,
    stage_activations,
)
from megatron_flowrl.planning.hardware import read_hardware
from megatron_flowrl.planning.memory import RankMemory, rank_memory, sampler_memory, trainable_bytes, transfer_bytes
from megatron_flowrl.planning.parameters import Parameter, counted_stages, matrix_elements, total_elements
from megatron_flowrl.planning.shapes import find_shapes

QWEN = find_shapes("Qwen2.5-7B").architecture
HARDWARE = read_hardware()
FULL = MicroBatch(tokens=16384, labels=12000, sequences=4, pairs=4 * 4096.0**2)


def configured(*settings: str) -> Config:
    return load_config(None, ["model.path=x", *settings])


def activations(config: Config, stage: int = 0, micro_batches: int = 8) -> Activations:
    return stage_activations(QWEN, config, stage, FULL, micro_batches, "transformer_engine")


def test_mixed_precision_takes_18_bytes_a_parameter() -> None:
    (stage,) = counted_stages(QWEN, configured())
    found = trainable_bytes(stage, configured(), ranks=1)
    count = total_elements(QWEN)  # the vocabulary of 152,064 is a multiple of 128
    assert found.weights == pytest.approx(2 * count, rel=1e-4)
    assert found.gradients == pytest.approx(4 * count, rel=1e-4)
    assert found.optimizer == 12 * count


def test_the_distributed_optimizer_cuts_states_alone() -> None:
    (stage,) = counted_stages(QWEN, configured())
    one, eight = (trainable_bytes(stage, configured(), ranks) for ranks in (1, 8))
    assert eight.optimizer == one.optimizer / 8 and eight.gradients == pytest.approx(one.gradients, rel=1e-4)
    whole = trainable_bytes(stage, configured("ddp.use_distributed_optimizer=false"), 8)
    assert whole.optimizer == one.optimizer


def test_buckets_and_shared_embeddings_are_padded() -> None:
    parameters = (Parameter("a", 100, 2), Parameter("embedding", 100, 2, shared=True), Parameter("b", 100, 2))
    found = trainable_bytes([parameters], configured(), ranks=3)  # buckets end at multiples of lcm(3, 128) = 384
    assert found.weights == 2 * 3 * 384 and found.gradients == 4 * 3 * 384


@pytest.mark.parametrize(
    ("settings", "stage", "micro_batches", "flying"),
    [
        ((), 0, 8, 1),
        (("parallel.pipeline_model_parallel_size=4",), 0, 8, 4),
        (("parallel.pipeline_model_parallel_size=4",), 3, 8, 1),
        (("parallel.pipeline_model_parallel_size=4",), 0, 2, 2),
        (("parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=7"), 1, 8, 29),
    ],
)
def test_micro_batches_in_flight(settings: tuple[str, ...], stage: int, micro_batches: int, flying: int) -> None:
    assert chunks_in_flight(configured(*settings), stage, micro_batches) == flying


def test_what_a_layer_keeps_by_hand() -> None:
    """An MLP of width 4 h, as many keys as queries, 16 bits: bytes for each element of the residual stream."""
    classic = replace(QWEN, num_query_groups=28, ffn_hidden_size=4 * QWEN.hidden_size)
    parts = layer_parts(classic, configured(), MicroBatch(1000, 0, 1, 0.0), "transformer_engine")
    per_element = {name: size / (1000 * QWEN.hidden_size) for name, size in parts.items()}
    assert per_element["attention_norm"] == per_element["mlp_norm"] == pytest.approx(4, rel=1e-3)
    assert per_element["mlp"] == 2 * 2 * 4 + 2 * 4  # gated: both halves of its input, and its output
    assert per_element["attention_inputs"] == 4 + 6 and per_element["projection"] == 2


def test_parallelism_and_recomputation_take_activations_away() -> None:
    plain = activations(configured()).kept
    both = ("parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true")
    assert activations(configured(*both)).kept == pytest.approx(plain / 4, rel=1e-3)
    assert activations(configured("parallel.context_parallel_size=2")).kept == pytest.approx(plain / 2, rel=0.1)
    full = (
        "recompute.recompute_granularity=full",
        "recompute.recompute_method=uniform",
        "recompute.recompute_num_layers=1",
    )
    kept = activations(configured(*full))
    assert kept.kept == pytest.approx(29 * 16384 * QWEN.hidden_size * 2, rel=1e-3)
    assert kept.recomputed > 0
    mlp = ("recompute.recompute_granularity=selective", "recompute.recompute_modules=[mlp]")
    assert kept.kept < activations(configured(*mlp)).kept < plain
    assert activations(configured("precision.fp8=hybrid")).kept < plain


def test_a_reference_in_host_memory_is_not_on_the_device() -> None:
    def memory(*settings: str, reference: bool = True) -> RankMemory:
        config = configured(*settings)
        (stage,) = counted_stages(QWEN, config, log_z=True)
        return rank_memory(stage, activations(config), config, HARDWARE, 8, reference=reference)

    resident, host, none = memory(), memory("reference.placement=host"), memory(reference=False)
    weights = 2 * total_elements(QWEN)
    assert resident.kinds["reference"] == host.host == weights and host.kinds["reference"] == none.host == 0
    assert resident.total - none.total == pytest.approx(weights * (1 + HARDWARE.memory.fragmentation))
    assert resident.kinds["log_z"] > 8 * (2 * QWEN.hidden_size**2)
    assert resident.kinds["log_prob"] > 2**28  # the op's working memory on a GPU


def test_what_training_keeps_beside_servers() -> None:
    """All but activations, with the allocator's losses, and the buffers of a transfer."""
    config = configured("parallel.tensor_model_parallel_size=2", "rollout.colocated=true")
    (stage,) = counted_stages(QWEN, config, log_z=True)
    vocabulary = 2 * QWEN.vocab_size * QWEN.hidden_size
    transfer = transfer_bytes(QWEN, config, HARDWARE)
    assert transfer == 1.5 * vocabulary + vocabulary  # a part and the whole of it in the stream; vLLM's buffer
    found = rank_memory(stage, activations(config), config, HARDWARE, 8, reference=True, transfer=transfer)
    gone = sum(found.kinds[kind] for kind in ("activations", "recomputation", "log_prob", "fragmentation", "context"))
    log_z = activations(config).log_z
    tensors = found.total - gone - log_z
    losses = 1 + HARDWARE.memory.fragmentation
    assert found.resident == pytest.approx(tensors * losses + found.kinds["context"] + transfer)
    small = replace(QWEN, vocab_size=1000, hidden_size=64, ffn_hidden_size=256)
    assert transfer_bytes(small, config, HARDWARE) == BUCKET_BYTES + HARDWARE.sampler.packed_buffer
    disk = replace(config, rollout=replace(config.rollout, transfer="disk"))
    assert transfer_bytes(QWEN, disk, HARDWARE) == 1.5 * vocabulary


def test_fp8_products_have_copies_of_the_weights() -> None:
    def copies(*settings: str, reference: bool = False) -> float:
        config = configured(*settings)
        (stage,) = counted_stages(QWEN, config)
        return rank_memory(stage, activations(config), config, HARDWARE, 8, reference=reference).kinds["fp8_copies"]

    (stage,) = counted_stages(QWEN, configured())
    matrices = sum(p.elements for chunk in stage for p in chunk if p.matrix)
    assert copies() == 0 and copies("precision.fp8=hybrid") == 2 * matrices
    assert copies("precision.fp8=hybrid", reference=True) == 3 * matrices
    assert copies("precision.fp8=hybrid", "precision.fp8_param_gather=true", reference=True) == matrices


def test_a_sampler_has_what_is_left_for_keys_and_values() -> None:
    given = configured("rollout.tensor_parallel_size=2", "rollout.extra_arguments=['--gpu-memory-utilization', '0.5']")
    found = sampler_memory(QWEN, given, HARDWARE, 80e9)
    assert found.limit == 40e9 and found.weights == total_elements(QWEN)
    assert found.kv_bytes_per_token == 2 * 28 * 2 * 128 * 2  # layers, groups of a worker, head, bytes
    assert found.kv_tokens == int((40e9 - found.weights - found.working) / found.kv_bytes_per_token)
    assert sampler_memory(QWEN, configured(), HARDWARE, 80e9).limit == HARDWARE.sampler.gpu_memory_utilization * 80e9


def test_a_sampler_in_fp8_reads_its_layers_matrices_in_a_byte() -> None:
    plain, fp8 = (
        sampler_memory(QWEN, configured(*given), HARDWARE, 80e9)
        for given in ((), ("rollout.quantization=fp8_per_block",))
    )
    assert plain.weights - fp8.weights == matrix_elements(QWEN) and fp8.kv_tokens > plain.kv_tokens
