"""What is read from config.json, what is refused, and in which words; rotary frequencies against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_flowrl.config import UserError
from megatron_flowrl.model.architecture import Architecture, architecture_of, read_architecture
from tests.tiny_models import MODELS, VOCABULARY

# As transformers 4 wrote it: `rope_theta` and `rope_scaling` at the top.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write(folder: Path, **changes: Any) -> Path:
    """`LLAMA` with changes (None leaves a key out), as a model folder."""
    content = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def refusal(folder: Path) -> str:
    """The message of the UserError; that it names the file is checked for all of them."""
    with pytest.raises(UserError) as caught:
        read_architecture(folder)
    assert str(folder / "config.json") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, tmp_path: Path) -> None:
    hf = MODELS[name]
    hf.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    family = name.split("_")[0]
    frequencies = AutoModelForCausalLM.from_config(hf).model.rotary_emb.inv_freq
    assert architecture == Architecture(
        family=family,
        hidden_size=48,
        num_layers=4,
        num_attention_heads=4,
        num_query_groups=1 if name == "qwen2_one_group" else 2,
        head_dim={"qwen3": 16, "mistral": 8}.get(family, 12),
        ffn_hidden_size=80,
        vocab_size=VOCABULARY,
        norm_epsilon=1e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_word_embeddings=name == "qwen2_tied",
        max_sequence_length=512,
        initializer_range=0.15,
        rope_theta=10000.0,
        rope_inv_freq=tuple(frequencies.tolist()),
    )
    assert architecture_of(hf) == architecture


def test_the_format_of_transformers_4(tmp_path: Path) -> None:
    architecture = read_architecture(write(tmp_path))
    assert architecture.rope_theta == 500000.0
    assert architecture.norm_epsilon == 1e-5
    assert architecture.rope_inv_freq[0] == 1.0
    assert architecture.rope_inv_freq[-1] == pytest.approx(500000.0 ** -(10 / 12), rel=1e-6)


def test_heads_without_groups_are_groups_of_one(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, num_key_value_heads=None)).num_query_groups == 4


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", **LLAMA3_SCALING},
        {"rope_type": "llama3", **LLAMA3_SCALING, "factor": 32.0, "high_freq_factor": 8.0},
    ],
)
@pytest.mark.parametrize("new_format", [False, True])
def test_scaled_frequencies_equal_transformers(scaling: dict[str, Any], new_format: bool, tmp_path: Path) -> None:
    if new_format:
        named = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
        write(tmp_path, rope_theta=None, rope_parameters={**named, "rope_theta": 500000.0})
    else:
        write(tmp_path, rope_scaling=scaling)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
    assert expected.attention_scaling == 1.0
    architecture = read_architecture(tmp_path)
    assert torch.equal(torch.tensor(architecture.rope_inv_freq), expected.inv_freq)
    unscaled = read_architecture(write(tmp_path)).rope_inv_freq
    assert architecture.rope_inv_freq != unscaled


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"model_type": "mistral", "sliding_window": 77}, 77),
        ({"model_type": "mistral", "sliding_window": 100_000}, 512),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 64),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, 512),
        ({"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "head_dim": 16}, 64),
        ({}, 512),
    ],
)
def test_a_sliding_window_bounds_the_sequence_length(changes: dict[str, Any], limit: int, tmp_path: Path) -> None:
    """Up to the window, attention with it and without are the same."""
    assert read_architecture(write(tmp_path, **changes)).max_sequence_length == limit


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"])
def test_mixtures_of_experts_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, model_type=model_type, rope_theta=None))
    assert f"model_type '{model_type}' is a mixture of experts" in message


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_dense_family_with_experts_is_refused(key: str, tmp_path: Path) -> None:
    assert "mixture of experts" in refusal(write(tmp_path, **{key: 8}))


@pytest.mark.parametrize("scaled", ["yarn", "dynamic", "longrope"])
def test_unsupported_rope(scaled: str, tmp_path: Path) -> None:
    scaling = {"rope_type": scaled, "factor": 4.0, "original_max_position_embeddings": 128}
    if scaled == "longrope":
        scaling |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    message = refusal(write(tmp_path, rope_scaling=scaling))
    assert f"rope_type '{scaled}' is not supported; supported are default, linear, llama3" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = true"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3 is not a multiple of num_key_value_heads = 2"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"intermediate_size": 0}, "intermediate_size = 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0"),
    ],
)
def test_what_is_refused_is_named_with_its_value(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert named in refusal(write(tmp_path, **changes))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, hidden_act="gelu", mlp_bias=True))
    assert "hidden_act" in message and "mlp_bias" in message


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, model_type="wobble"))
    assert "model type" in message and "wobble" in message


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        read_architecture(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path)


@pytest.mark.parametrize("content", ['{"model_type": "llama",', "", "\x00", "[]", "null", "{}"])
def test_a_file_that_is_no_configuration(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "cannot be read as a model configuration: " in refusal(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{}")
    assert "not a valid JSON file" in refusal(tmp_path)


def test_nothing_is_fetched_and_no_code_of_the_folder_is_run(tmp_path: Path) -> None:
    (tmp_path / "strange.py").write_text("raise SystemExit('this ran')")
    write(tmp_path, model_type="strange", auto_map={"AutoConfig": "strange.Config"})
    refusal(tmp_path)


@pytest.mark.parametrize("value", ["48", 48.5])
def test_a_value_of_the_wrong_type_is_shown(value: Any, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, hidden_size=value))
    assert "hidden_size" in message and repr(value) in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor"),
        ({"head_dim": -4}, "head_dim"),
    ],
)
def test_a_value_that_cannot_be_computed_with_is_refused(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert key in refusal(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -10.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
)
def test_a_value_out_of_range_is_refused(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert key in refusal(write(tmp_path, **changes))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    assert "quantization_config" in refusal(write(tmp_path, quantization_config={"quant_method": "fp8"}))
