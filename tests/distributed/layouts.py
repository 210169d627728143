"""The layouts whose results are compared: what differs from the plain one-rank run, and on how many ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """A case: settings that differ from the baseline, on so many ranks."""

    name: str
    ranks: int
    model: str = "qwen2"
    settings: dict[str, Any] = field(default_factory=dict)
    tokens_per_micro_batch: int = 512
    shuffle: int | None = None  # another order of the sequences, hence another packing
    vocabulary: tuple[int, int] = (0, 299)  # ids the sequences draw from

    @property
    def baseline(self) -> tuple[str, tuple[int, int], str, str]:
        """Cases that must agree share this; the first one of LAYOUTS is what the others are compared with."""
        return (
            self.model,
            self.vocabulary,
            self.settings.get("precision.dtype", "float32"),
            self.settings.get("model.init", "pretrained"),
        )


def parallel(**sizes: Any) -> dict[str, Any]:
    """Settings by short names: parallel(tp=2, pp=2)."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "sp": "sequence_parallel",
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
    }
    return {f"parallel.{names[key]}": value for key, value in sizes.items()}


_FULL: dict[str, Any] = {
    "recompute.recompute_granularity": "full",
    "recompute.recompute_method": "uniform",
    "recompute.recompute_num_layers": 1,
}
_SELECTIVE: dict[str, Any] = {"recompute.recompute_granularity": "selective"}
_SELECTIVE_BOTH = _SELECTIVE | {"recompute.recompute_modules": "[core_attn,mlp]"}
_BLOCK = _FULL | {"recompute.recompute_method": "block"}
_BF16 = {"precision.dtype": "bfloat16"}
_RANDOM = {"model.init": "random"}
_ONE_HALF = (0, 140)  # all labels in the vocabulary half of the first of two tensor-parallel ranks

LAYOUTS = [
    Layout("one_rank", 1),
    Layout("one_sequence_a_micro_batch", 1, tokens_per_micro_batch=61),
    Layout("another_order", 1, shuffle=3),
    Layout("recompute_full", 1, settings=_FULL),
    Layout("recompute_selective", 1, settings=_SELECTIVE),
    Layout("one_rank_tied", 1, "qwen2_tied"),
    Layout("one_rank_one_group", 1, "qwen2_one_group"),
    Layout("one_rank_qwen3", 1, "qwen3"),
    Layout("one_rank_llama", 1, "llama"),
    Layout("one_rank_mistral", 1, "mistral"),
    Layout("one_rank_one_half", 1, vocabulary=_ONE_HALF),
    Layout("one_rank_bf16", 1, settings=_BF16),
    Layout("one_rank_random", 1, "qwen2_tied", settings=_RANDOM),
    Layout("tp2", 2, settings=parallel(tp=2)),
    Layout("tp2_sp", 2, settings=parallel(tp=2, sp=True)),
    Layout("pp2", 2, settings=parallel(pp=2)),
    Layout("pp2_uneven_last", 2, settings=parallel(pp=2, last=1)),
    Layout("pp2_uneven_first", 2, settings=parallel(pp=2, first=1)),
    Layout("pp2_vpp2", 2, settings=parallel(pp=2, vpp=2)),
    Layout("tp2_sp_recompute_selective_both", 2, settings=parallel(tp=2, sp=True) | _SELECTIVE_BOTH),
    Layout("pp2_recompute_block", 2, settings=parallel(pp=2) | _BLOCK),
    Layout("pp2_recompute_full", 2, settings=parallel(pp=2) | _FULL),
    Layout("cp2", 2, settings=parallel(cp=2)),
    Layout("cp2_recompute_selective", 2, settings=parallel(cp=2) | _SELECTIVE),
    Layout("dp2", 2),
    Layout("dp2_another_order", 2, shuffle=3, tokens_per_micro_batch=128),
    Layout("pp2_tied", 2, "qwen2_tied", settings=parallel(pp=2)),
    Layout("tp2_tied", 2, "qwen2_tied", settings=parallel(tp=2)),
    Layout("tp2_sp_tied", 2, "qwen2_tied", settings=parallel(tp=2, sp=True)),
    Layout("pp2_vpp2_tied", 2, "qwen2_tied", settings=parallel(pp=2, vpp=2)),
    Layout("tp2_one_group", 2, "qwen2_one_group", settings=parallel(tp=2)),
    Layout("tp2_sp_one_group", 2, "qwen2_one_group", settings=parallel(tp=2, sp=True)),
    Layout("tp2_qwen3", 2, "qwen3", settings=parallel(tp=2)),
    Layout("tp2_sp_qwen3", 2, "qwen3", settings=parallel(tp=2, sp=True)),
    Layout("cp2_llama", 2, "llama", settings=parallel(cp=2)),
    Layout("tp2_mistral", 2, "mistral", settings=parallel(tp=2)),
    Layout("tp2_one_half", 2, vocabulary=_ONE_HALF, settings=parallel(tp=2)),
    Layout("tp2_sp_one_half", 2, vocabulary=_ONE_HALF, settings=parallel(tp=2, sp=True)),
    Layout("tp2_bf16", 2, settings=parallel(tp=2) | _BF16),
    Layout("tp2_sp_bf16", 2, settings=parallel(tp=2, sp=True) | _BF16),
    Layout("pp2_bf16", 2, settings=parallel(pp=2) | _BF16),
    Layout("cp2_bf16", 2, settings=parallel(cp=2) | _BF16),
    Layout("dp2_bf16", 2, settings=_BF16),
    Layout("tp2_pp2", 4, settings=parallel(tp=2, pp=2)),
    Layout("tp2_sp_pp2_tied", 4, "qwen2_tied", settings=parallel(tp=2, sp=True, pp=2)),
    Layout("cp2_tp2", 4, settings=parallel(cp=2, tp=2)),
    Layout("cp2_tp2_sp", 4, settings=parallel(cp=2, tp=2, sp=True)),
    Layout("cp2_pp2_qwen3", 4, "qwen3", settings=parallel(cp=2, pp=2)),
    Layout("cp2_dp2", 4, settings=parallel(cp=2)),
    Layout("pp2_vpp2_dp2", 4, settings=parallel(pp=2, vpp=2)),
    Layout("cp4", 4, settings=parallel(cp=4)),
    Layout("tp2_pp2_random", 4, "qwen2_tied", settings=parallel(tp=2, pp=2) | _RANDOM),
]
