"""A critic's output: the value of the state before each token, in the place of the vocabulary's output layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor, nn


@dataclass(frozen=True)
class ValueRequest:
    """The tokens whose states are asked for: rows int64 [N], positions among this context-parallel rank's tokens."""

    rows: Tensor


@dataclass(frozen=True)
class TokenValues:
    """fp32 [N], in the order of the request, equal on all tensor-parallel ranks."""

    values: Tensor


class ValueHead(nn.Module):
    """Linear(h, 1) in fp32, which begins at 0; whole on every tensor-parallel rank."""

    weight = None  # what Megatron looks for in an output layer

    def __init__(self, hidden_size: int, tp_group: dist.ProcessGroup, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.value = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self._tp_group, self._sequence_parallel = tp_group, sequence_parallel

    def forward(self, hidden: Tensor, request: ValueRequest) -> TokenValues:
        """hidden [tokens (/ TP), 1, hidden]. Every tensor-parallel rank computes the same loss from the same values.

        So their gradients of gathered hidden states are equal: each keeps its part of one, and nothing is added up.
        """
        if self._sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self._tp_group
            )
        values: Tensor = self.value(hidden.squeeze(1).index_select(0, request.rows).float())
        return TokenValues(values.squeeze(-1))
