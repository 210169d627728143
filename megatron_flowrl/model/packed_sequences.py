"""The packed (THD) description of a micro-batch that travels through Megatron's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_flowrl.data.context_parallel import context_parallel_positions
from megatron_flowrl.ops.packed_attention import AttentionLayout, attention_layout


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed-sequence parameters, and what our own attention derives from them once a model chunk.

    Alignment padding at the end of a sequence counts as part of it: it lies behind every real token, so causal
    attention never reaches it, and every attention back end of Transformer Engine takes such input.
    """

    boundaries: tuple[int, ...] = (0,)
    cp_rank: int = 0
    cp_size: int = 1
    device: torch.device | None = None

    @cached_property
    def attention_layout(self) -> AttentionLayout:
        """Which local tokens attend to which."""
        return attention_layout(self.boundaries, self.cp_rank, self.cp_size, self.device)

    @cached_property
    def global_order(self) -> Tensor:
        """int64 [T]: where each global position stands among the tokens gathered rank by rank."""
        ranks = [context_parallel_positions(self.boundaries, self.cp_size, rank) for rank in range(self.cp_size)]
        gathered = torch.tensor([position for rank in ranks for position in rank], dtype=torch.int64)
        return torch.argsort(gathered).to(self.device)


def packed_sequences(boundaries: Sequence[int], cp_rank: int, cp_size: int, device: torch.device) -> PackedSequences:
    """Describe sequences with (global, padded) `boundaries` [n + 1], counted over all context-parallel ranks."""
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    # Exactly the longest: Megatron takes frequencies as many as there are tokens for positions in the whole pack.
    longest = max(end - start for start, end in pairwise(boundaries))
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        boundaries=tuple(boundaries),
        cp_rank=cp_rank,
        cp_size=cp_size,
        device=device,
    )
