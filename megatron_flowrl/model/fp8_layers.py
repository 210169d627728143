"""Where there is no Transformer Engine: linear layers of the decoder whose products are of FP8 numbers.

They are the torch layers, with the same names, parameters and checkpoint entries; only their products differ
(ops/fp8_linear.py). As with Transformer Engine, each tensor-parallel rank scales its own part of a weight, and
gathered input and output gradients are scaled as wholes; embeddings, attention, norms, the output layer, log Z and the
objective stay in the model's dtype. Delayed scales are in no checkpoint: they begin anew with a run's next start. They
are updated at the next forward pass, which in a pipeline may be before the backward pass of the one before.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_flowrl.config import PrecisionConfig
from megatron_flowrl.model.torch_layers import NormColumnParallelLinear
from megatron_flowrl.ops.fp8_linear import Fp8Products, fp8_linear


class _InFp8:
    """For a parallel linear layer of Megatron: its product, which it has in a method, by FP8 numbers."""

    def __init__(self, *args: Any, precision: PrecisionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert precision.fp8 is not None
        self.fp8 = Fp8Products(
            precision.fp8_recipe,
            precision.fp8,
            margin=precision.fp8_margin,
            history_len=precision.fp8_amax_history_len,
            algo=precision.fp8_amax_compute_algo,
            group=parallel_state.get_amax_reduction_group(with_context_parallel=True),
        )

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> Tensor:
        group = tp_group if allreduce_dgrad or sequence_parallel else None
        return fp8_linear(input, weight, bias, self.fp8, group=group, sequence_parallel=sequence_parallel)


class Fp8NormColumnParallelLinear(_InFp8, NormColumnParallelLinear):
    """RMSNorm, then a column-parallel linear layer in FP8."""


class Fp8RowParallelLinear(_InFp8, RowParallelLinear):
    """A row-parallel linear layer in FP8."""


def with_precision(module: type, precision: PrecisionConfig) -> ModuleSpec:
    """Either of these two layers, for a layer specification: Megatron gives the rest when it builds it."""
    return ModuleSpec(module=module, params={"precision": precision})


def is_bf16_layer(precision: PrecisionConfig, layer: int, layers: int) -> bool:
    """Whether `layer`, counted over the whole model of `layers` from 0, is kept out of FP8."""
    if precision.fp8 is None:
        return True
    if not precision.first_last_layers_bf16:
        return False
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return layer < first or layer >= layers - last


__all__ = ["Fp8NormColumnParallelLinear", "Fp8RowParallelLinear", "is_bf16_layer", "with_precision"]
