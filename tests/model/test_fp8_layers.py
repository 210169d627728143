"""Which layers of a model are in FP8 where there is no Transformer Engine."""

from __future__ import annotations

from pathlib import Path

from megatron_flowrl.config import Config, PrecisionConfig
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model
from megatron_flowrl.model.fp8_layers import Fp8NormColumnParallelLinear, Fp8RowParallelLinear, is_bf16_layer
from megatron_flowrl.platform import Platform
from tests.tiny_models import save_model


def test_which_layers_are_in_fp8(tmp_path: Path, one_rank_platform: Platform) -> None:
    precision = PrecisionConfig(
        fp8="e4m3", fp8_recipe="blockwise", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2
    )
    architecture = read_architecture(save_model("qwen2", tmp_path))
    model, plain = (
        build_parallel_model(architecture, Config(precision=one), one_rank_platform, log_z=True).modules[0]
        for one in (precision, PrecisionConfig())
    )
    in_fp8 = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Fp8NormColumnParallelLinear | Fp8RowParallelLinear)
    ]
    linears = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    assert sorted(in_fp8) == [f"decoder.layers.1.{name}" for name in linears]  # no embedding, output layer, log Z
    assert list(model.state_dict()) == list(plain.state_dict())


def test_first_and_last_layers_are_counted_over_the_whole_model() -> None:
    plain, kept = PrecisionConfig(fp8="hybrid"), PrecisionConfig(fp8="hybrid", first_last_layers_bf16=True)
    assert [is_bf16_layer(kept, layer, 4) for layer in range(4)] == [True, False, False, True]
    assert not any(is_bf16_layer(plain, layer, 4) for layer in range(4))
    assert all(is_bf16_layer(PrecisionConfig(), layer, 4) for layer in range(4))
