"""Random tiny models of every family, as Hugging Face folders, and random sequences for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_flowrl.data.batch import TokenSequence

VOCABULARY = 299  # divisible by nothing a layout would like

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen2_tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2_one_group": Qwen2Config(**{**_SIZES, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "llama": LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE),
    "mistral": MistralConfig(**_SIZES, sliding_window=None, head_dim=8),
}


def save_model(name: str, folder: Path) -> Path:
    """Write the model `name` with random weights, biases and norms included, to `folder`."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers starts these at 0 and 1, where a mix-up would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def save_model_for_vllm(folder: Path, *, tied: bool = True, seed: int = 3) -> Path:
    """Write a Qwen2 with random weights that vLLM can serve on a CPU, where heads of 32 are the least it takes."""
    config = Qwen2Config(**{**_SIZES, "hidden_size": 128, "intermediate_size": 160}, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def random_sequences(
    count: int, *, longest: int = 60, seed: int = 0, vocabulary: range = range(VOCABULARY)
) -> list[TokenSequence]:
    """Ragged sequences of 1 to `longest` tokens and more: at least one prompt token; some responses of one or none."""
    draw = random.Random(seed)
    sequences = []
    for index in range(count):
        prompt = draw.randint(1, max(1, longest // 3))
        response = index % 2 if index < 4 else draw.randint(0, longest - prompt)
        tokens = draw.choices(vocabulary, k=prompt + response)
        sequences.append(TokenSequence(tuple(tokens[:prompt]), tuple(tokens[prompt:])))
    return sequences
