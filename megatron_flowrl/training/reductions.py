"""Sums that cross ranks, differentiable, in the order the objectives need them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor


def sequence_sums(values: Tensor, sequence_of_row: Tensor, num_sequences: int, cp_group: dist.ProcessGroup) -> Tensor:
    """Sum per-token values over each sequence, over all context-parallel ranks.

    values fp32 [N], sequence_of_row int64 [N] -> fp32 [num_sequences], the same on every rank of the group.

    Backward hands each rank the gradient of its own tokens, unreduced: every rank computes the same loss from the
    same sums, and Megatron adds the ranks' parameter gradients up, in which each token then counts once.
    """
    sums = torch.zeros(num_sequences, dtype=values.dtype, device=values.device)
    sums = sums.index_add(0, sequence_of_row, values)
    if cp_group.size() == 1:
        return sums
    reduced: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(sums, group=cp_group)
    return reduced
