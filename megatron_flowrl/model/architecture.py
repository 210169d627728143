"""What a Hugging Face config folder says of a model, checked, in one typed object.

Families: Qwen2/2.5 (DeepSeek-R1-Distill-Qwen is this), Qwen3, Llama 3.x, Mistral. What a family may not vary here is
refused by name: mixture of experts, biases Megatron would have to place elsewhere, RoPE variants whose frequencies
depend on the length.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_flowrl.config import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Architecture:
    """A dense, pre-norm, RoPE decoder with grouped-query attention and a SwiGLU feed-forward layer.

    Sizes are in elements; `max_sequence_length` is in tokens and is the longest sequence whose attention this
    project computes as the model's authors defined it (the position limit, or the sliding window if that is shorter).
    `rope_inv_freq` are the head_dim / 2 rotary frequencies, scaling applied.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_sequence_length: int
    initializer_range: float
    rope_theta: float
    rope_inv_freq: tuple[float, ...]


def read_architecture(folder: str | os.PathLike[str]) -> Architecture:
    """Read `folder/config.json` (transformers 4 or 5 format).

    Raises UserError, naming file, key and value, where the file is missing or unreadable, or describes a model that
    is not supported.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"model folder {str(folder)!r} does not exist: give the path of a Hugging Face folder")
    if not path.is_file():
        raise UserError(f"{path} does not exist: a Hugging Face model folder has a config.json")
    try:
        hf = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds, all of them about this file
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"{path} cannot be read as a model configuration: {reason}") from error
    return architecture_of(hf, where=str(path))


def architecture_of(hf: transformers.PretrainedConfig, where: str = "config.json") -> Architecture:
    """Translate a transformers configuration; `where` names its origin in errors."""
    problems = _unsupported(hf)
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    window = hf.sliding_window if _uses_sliding_window(hf) else None
    return Architecture(
        family=hf.model_type,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        head_dim=head_dim,
        ffn_hidden_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        norm_epsilon=hf.rms_norm_eps,
        qkv_bias=hf.model_type == "qwen2",
        qk_norm=hf.model_type == "qwen3",
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        max_sequence_length=min(hf.max_position_embeddings, hf.max_position_embeddings if window is None else window),
        initializer_range=hf.initializer_range,
        rope_theta=float(hf.rope_parameters["rope_theta"]),
        rope_inv_freq=_rope_inv_freq(hf, head_dim),
    )


def _unsupported(hf: transformers.PretrainedConfig) -> list[str]:
    experts = next((k for k in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(hf, k, 0)), None)
    if experts or "moe" in hf.model_type or hf.model_type == "mixtral":
        return [f"model_type {hf.model_type!r} is a mixture of experts; only dense models are supported"]
    if hf.model_type not in FAMILIES:
        return [f"model_type {hf.model_type!r} is not supported; supported are {', '.join(FAMILIES)}"]
    problems = [
        f"{key} = {getattr(hf, key, None)!r} must be a whole number above 0"
        for key in (
            "hidden_size",
            "intermediate_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "vocab_size",
        )
        if not isinstance(getattr(hf, key, None), int) or getattr(hf, key) <= 0
    ]
    if problems:
        return problems
    if getattr(hf, "quantization_config", None) is not None:
        problems.append("quantization_config: quantised weights are not supported; give the bf16 or fp32 checkpoint")
    problems += _unsupported_numbers(hf)
    if hf.num_attention_heads % hf.num_key_value_heads:
        heads, groups = hf.num_attention_heads, hf.num_key_value_heads
        problems.append(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}")
    if getattr(hf, "head_dim", None) is None and hf.hidden_size % hf.num_attention_heads:
        size, heads = hf.hidden_size, hf.num_attention_heads
        problems.append(f"hidden_size = {size} is not a multiple of num_attention_heads = {heads}")
    if hf.hidden_act != "silu":
        problems.append(f"hidden_act = {hf.hidden_act!r} is not supported, only 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(hf, key, False):
            problems.append(f"{key} = true is not supported")
    if getattr(hf, "attention_dropout", 0.0):
        problems.append(f"attention_dropout = {hf.attention_dropout} is not supported: set it to 0")
    return problems + _unsupported_rope(hf.rope_parameters or {})


def _unsupported_rope(rope: dict[str, Any]) -> list[str]:
    problems = []
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        allowed = ", ".join(_ROPE_TYPES)
        problems.append(f"rope_type {rope['rope_type']!r} is not supported; supported are {allowed}")
    for key in ("rope_theta", "factor"):
        if (key == "rope_theta" or key in rope) and not _is_positive(rope.get(key)):
            problems.append(f"{key} = {rope.get(key)!r} must be a number above 0")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor = {rope['partial_rotary_factor']} is not supported")
    return problems


def _unsupported_numbers(hf: transformers.PretrainedConfig) -> list[str]:
    problems = [
        f"{key} = {getattr(hf, key)!r} must be a number above 0"
        for key in ("rms_norm_eps", "initializer_range")
        if not _is_positive(getattr(hf, key))
    ]
    if _uses_sliding_window(hf) and (type(hf.sliding_window) is not int or hf.sliding_window < 1):
        problems.append(f"sliding_window = {hf.sliding_window!r} must be a whole number above 0")
    head_dim = getattr(hf, "head_dim", None)
    if head_dim is None:
        head_dim = hf.hidden_size // hf.num_attention_heads
    if type(head_dim) is not int or head_dim <= 0 or head_dim % 2:
        problems.append(f"head_dim = {head_dim!r} must be an even whole number above 0: RoPE turns pairs")
    return problems


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _uses_sliding_window(hf: transformers.PretrainedConfig) -> bool:
    if hf.model_type == "mistral":
        return getattr(hf, "sliding_window", None) is not None
    return bool(getattr(hf, "use_sliding_window", False)) and getattr(hf, "sliding_window", None) is not None


def _rope_inv_freq(hf: Any, head_dim: int) -> tuple[float, ...]:
    """Rotary frequencies in fp32, by transformers' own formulas, so that both sides turn by the same angles."""
    parameters = hf.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf, torch.device("cpu"))
        if not math.isclose(attention_factor, 1.0):
            raise UserError(
                f"rope_type {parameters['rope_type']!r} scales attention by {attention_factor}: not supported"
            )
    else:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        inv_freq = 1.0 / parameters["rope_theta"] ** exponents
    return tuple(inv_freq.tolist())
