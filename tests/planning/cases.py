"""Models and layouts whose memory is measured: three families, each in four layouts and more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.distributed.layouts import parallel

TOKENS, PROMPT = 700, 16
LENGTHS = [170, 150, 170, 150]  # each micro-batch has these; of a mean that needs no stacking
_FULL: dict[str, Any] = {
    "recompute.recompute_granularity": "full",
    "recompute.recompute_method": "uniform",
    "recompute.recompute_num_layers": 1,
}
_SELECTIVE: dict[str, Any] = {
    "recompute.recompute_granularity": "selective",
    "recompute.recompute_modules": ["core_attn", "mlp"],
}


@dataclass(frozen=True)
class Case:
    """On two ranks; `micro_batches`: of each data-parallel rank."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1


_FAMILIES = ("qwen2", "llama", "qwen3")
CASES: dict[str, Case] = {
    **{f"{model}_dp2": Case(model, {}, 2) for model in _FAMILIES},
    **{f"{model}_tp2_sp": Case(model, parallel(tp=2, sp=True)) for model in _FAMILIES},
    **{f"{model}_pp2": Case(model, parallel(pp=2), 4) for model in _FAMILIES},
    **{f"{model}_cp2": Case(model, parallel(cp=2)) for model in _FAMILIES},
    "qwen2_tied_full": Case("qwen2_tied", _FULL),
    "qwen2_pp2_full": Case("qwen2", parallel(pp=2) | _FULL, 4),
    "qwen3_selective": Case("qwen3", _SELECTIVE),
    "qwen2_tied_pp2_vpp2": Case("qwen2_tied", parallel(pp=2, vpp=2), 4),
    "qwen2_fp32": Case("qwen2", {"precision.dtype": "float32", "ddp.use_distributed_optimizer": False}),
    "llama_overlap": Case("llama", {"ddp.overlap_grad_reduce": True, "ddp.bucket_size": 40000}),
}
