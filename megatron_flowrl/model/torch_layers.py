"""Plain PyTorch layers with the names, shapes and dtypes of Megatron's Transformer Engine modules.

They stand where Transformer Engine cannot run. Parameters are named as Transformer Engine names them (the norm before
a linear layer is part of that layer), so that one checkpoint and one weight mapping serve both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_flowrl.model.packed_sequences import PackedSequences
from megatron_flowrl.ops.packed_attention import packed_attention
from megatron_flowrl.ops.row_wise import rms_norm, swiglu


def _norm_weight(size: int, config: TransformerConfig) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
    # Each tensor-parallel rank sees its own tokens then: Megatron sums the gradients of what carries this mark.
    setattr(weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - Parameter has no such field
    return weight


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019); statistics in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(hidden_size, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)

    def get_extra_state(self) -> None:
        """Transformer Engine's norms have an entry for FP8 state in a checkpoint; here it is empty."""

    def set_extra_state(self, state: Any) -> None:
        """Transformer Engine's FP8 state has no use here."""


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear layer: the twin of `TELayerNormColumnParallelLinear`."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(input_size, config)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = rms_norm(input_, self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(normed, *args, **kwargs)


class SwiGLU(torch.nn.Module):
    """The activation of the gated feed-forward layer, through the hook Megatron has for Transformer Engine's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return swiglu(gate_and_up)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Megatron asks every module of a feed-forward layer; this one has nothing to save."""
        return {}


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences, in the place of `TEDotProductAttention`.

    Under context parallelism the keys and values of all ranks are gathered; queries stay where they are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"only causal self-attention is supported, not {attn_mask_type} {attention_type}")
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads, d]."""
        if not isinstance(packed_seq_params, PackedSequences):
            raise TypeError("PackedAttention needs packed_seq_params of type PackedSequences")
        if self.cp_group.size() > 1:
            key, value = self._all_tokens(key, packed_seq_params), self._all_tokens(value, packed_seq_params)
        return packed_attention(query, key, value, packed_seq_params.attention_layout, self.scale)

    def _all_tokens(self, local: Tensor, sequences: PackedSequences) -> Tensor:
        gathered = gather_from_sequence_parallel_region(
            local.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
        )
        return gathered.index_select(0, sequences.global_order)
