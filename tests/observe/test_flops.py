"""Operations against those that torch counts in a real model; peaks from the table and by measurement."""

from __future__ import annotations

import math
import mmap
import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_flowrl.config import UserError
from megatron_flowrl.observe import flops
from megatron_flowrl.observe.flops import TransformerSize, forward_flops, memory, peak_flops, training_flops

SIZE = TransformerSize(hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=80, vocab=96)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=80, vocab_size=96, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def counted(model: LlamaForCausalLM, length: int, *, backward: bool) -> float:
    """What torch counts, less attention's half above the diagonal, which this model computes."""
    tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    above = SIZE.layers * 4 * SIZE.heads * 16 * length * length / 2
    return counter.get_total_flops() - above * (3 if backward else 1)


@pytest.mark.parametrize("length", [8, 33])
def test_operations_are_those_of_a_real_model(model: LlamaForCausalLM, length: int) -> None:
    assert forward_flops(SIZE, [length]) == counted(model, length, backward=False)
    assert training_flops(SIZE, [length]) == counted(model, length, backward=True)


def test_attention_is_counted_sequence_by_sequence() -> None:
    one, packed = forward_flops(SIZE, [8]), forward_flops(SIZE, [8, 8, 8])
    assert packed == 3 * one < forward_flops(SIZE, [24])
    assert forward_flops(SIZE, []) == 0


def test_the_output_layer_may_be_applied_to_some_tokens() -> None:
    assert forward_flops(SIZE, [8]) - forward_flops(SIZE, [8], logits=3) == 5 * 2 * 48 * 96


def test_an_mlp_without_a_gate_has_two_matrices() -> None:
    plain = TransformerSize(hidden=48, layers=3, heads=4, kv_heads=4, ffn=80, vocab=96, gated=False)
    assert forward_flops(plain, [1], logits=0) == 3 * (2 * (4 * 48 * 48 + 2 * 48 * 80) + 2 * 48)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.5), ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989.5), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA A10G", math.nan),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", math.nan), ("Another", math.nan), ("", math.nan),
    ],
)  # fmt: skip
def test_peaks_by_the_names_that_torch_gives(name: str, bf16: float) -> None:
    assert peak_flops(name, "bfloat16") == pytest.approx(bf16 * 1e12, nan_ok=True)


def test_peaks_by_dtype() -> None:
    name = "NVIDIA H100 80GB HBM3"
    peaks = [peak_flops(name, dtype) for dtype in ("float32", "float16", "bfloat16", "fp8")]
    assert peaks == [67e12, 989.5e12, 989.5e12, 1979e12]
    assert math.isnan(peak_flops("NVIDIA A100-SXM4-80GB", "fp8")) and math.isnan(peak_flops(None, "fp8"))
    with pytest.raises(UserError, match="no peak is known of dtype 'int8'"):
        peak_flops(name, "int8")


def test_a_cpu_is_measured_within_a_second_and_once() -> None:
    flops._measured_peak.cache_clear()
    begin = time.process_time()
    first = peak_flops(None, "float32")
    assert 1e8 < first < 1e15
    assert time.process_time() - begin < 1 * max(1, torch.get_num_threads())
    assert peak_flops(None, "float32") == first


def test_memory_of_this_process() -> None:
    before = memory()
    with mmap.mmap(-1, 50_000_000) as ballast:  # what the allocator was given back it would use again
        ballast.write(b"\x01" * len(ballast))
        after = memory()
    assert before.resident > 10_000_000 and after.resident - before.resident > 0.8 * 50_000_000
    assert after.accelerator_peak is None


def test_memory_of_an_accelerator_begins_a_new_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answering(name: str, value: Any) -> Any:
        return lambda: asked.append(name) or value

    monkeypatch.setattr(flops.cuda_stand_in, "is_installed", lambda: False)
    for name, value in {"is_available": True, "max_memory_allocated": 7, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, answering(name, value))
    assert memory().accelerator_peak == 7
    assert asked == ["is_available", "max_memory_allocated", "reset_peak_memory_stats"]
