"""The shape of the model that a recipe names: its folder's, or as published where the folder is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.config import UserError
from megatron_flowrl.model.architecture import Architecture, architecture_of, read_architecture

_QWEN2: dict[str, Any] = {"vocab_size": 152064, "max_position_embeddings": 131072, "tie_word_embeddings": False}
_7B = _QWEN2 | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}
_32B = _QWEN2 | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B": _7B | {"rope_theta": 1e6},
    "Qwen/Qwen2.5-32B": _32B | {"rope_theta": 1e6},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _7B | {"rope_theta": 1e4},
}


def shape_of(path: str) -> Architecture:
    """The architecture of `model.path`. Raises UserError where there is neither a folder nor a published shape."""
    if Path(path).is_dir():
        return read_architecture(locate_model(path).hugging_face)
    name = next((name for name in PUBLISHED if path.rstrip("/").endswith(name.rpartition("/")[2])), None)
    if name is None:
        raise UserError(
            f"model.path = {path!r} is no folder here, and no model whose shape is known: {', '.join(PUBLISHED)}"
        )
    return architecture_of(transformers.Qwen2Config(**PUBLISHED[name]), where=name)


__all__ = ["PUBLISHED", "shape_of"]
