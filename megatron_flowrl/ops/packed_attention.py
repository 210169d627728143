"""Causal attention over packed sequences, on any device torch has.

The CPU counterpart of Transformer Engine's `thd` attention. Sequences of similar length are stacked and go through
`scaled_dot_product_attention` together; what stacking adds at the end of a shorter sequence lies behind its last
token, where causal attention does not look.

Under context parallelism each rank holds chunks `r` and `2 CP - 1 - r` of every sequence (of 2 CP equal chunks) and
the keys and values of all: its queries are then later positions of a longer sequence, which takes a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Sequences share a stack while the shortest is at least this share of the longest (or within a few tokens of it).
_STACKING_SHARE = 0.8
_STACKING_SLACK = 8
# From this mean length on a sequence keeps the processor busy alone, and stacking would only pad.
_LONG = 128


@dataclass(frozen=True)
class _Stack:
    """Pieces of sequences computed in one call; index tensors are int64, [pieces, longest]."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None  # bool [pieces, 1, queries, keys], True where a query may look; None: plain causal
    is_real: Tensor  # bool [pieces, longest query], False for what stacking added


@dataclass(frozen=True)
class AttentionLayout:
    """Which tokens of a packed micro-batch attend to which; made once and used by every layer."""

    stacks: tuple[_Stack, ...]
    order: Tensor | None  # int64 [T]: row of the stacked outputs for each local token; None: already in order
    lengths: tuple[int, ...] | None  # of sequences that need no stack: all of one length, or long enough each


def attention_layout(
    cu_seqlens: Sequence[int], cp_rank: int = 0, cp_size: int = 1, device: torch.device | None = None
) -> AttentionLayout:
    """The layout of sequences with boundaries `cu_seqlens` (global, padded) on one context-parallel rank.

    Local tokens stand sequence by sequence, each sequence's two chunks one after the other; keys are indexed by
    their global position. Lengths must be multiples of 2 * cp_size where cp_size > 1.
    """
    if cp_size == 1:
        lengths = tuple(end - start for start, end in pairwise(cu_seqlens) if end > start)
        if len(set(lengths)) == 1 or sum(lengths) >= _LONG * len(lengths) > 0:
            return AttentionLayout((), None, lengths)
    pieces = [piece for piece in _pieces(cu_seqlens, cp_rank, cp_size) if piece.num_queries]
    # Keys first: under context parallelism pieces of one chunk size see different numbers of keys.
    longest_first = sorted(pieces, key=lambda piece: (-piece.num_keys, -piece.num_queries, piece.query_start))
    groups: list[list[_Piece]] = []
    for piece in longest_first:
        if groups and _stack_together(piece, groups[-1][0]):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    stacks = tuple(_stack(group, cp_size > 1, device) for group in groups)
    stacked = [stack.queries[stack.is_real] for stack in stacks]
    rows = torch.cat(stacked) if stacked else torch.zeros(0, dtype=torch.int64, device=device)
    in_order = bool((rows == torch.arange(len(rows), device=device)).all())
    return AttentionLayout(stacks, None if in_order else torch.argsort(rows), None)


class _Piece(NamedTuple):
    """Local queries of one sequence that follow one another, and the keys the last of them sees."""

    query_start: int
    num_queries: int
    key_start: int
    num_keys: int


def _pieces(cu_seqlens: Sequence[int], cp_rank: int, cp_size: int) -> Iterator[_Piece]:
    local = 0
    for start, end in pairwise(cu_seqlens):
        if cp_size == 1:
            yield _Piece(local, end - start, start, end - start)
            local += end - start
            continue
        chunk = (end - start) // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            yield _Piece(local, chunk, start, chunk * (index + 1))
            local += chunk


def _stack_together(piece: _Piece, longest: _Piece) -> bool:
    def close(length: int, reference: int) -> bool:
        return min(length, reference) >= max(length, reference) * _STACKING_SHARE - _STACKING_SLACK

    return close(piece.num_queries, longest.num_queries) and close(piece.num_keys, longest.num_keys)


def _stack(pieces: list[_Piece], masked: bool, device: torch.device | None) -> _Stack:
    query_start, num_queries, key_start, num_keys = torch.tensor(pieces, device=device).unsqueeze(2).unbind(1)
    query = torch.arange(int(num_queries.max()), device=device).unsqueeze(0)
    key = torch.arange(int(num_keys.max()), device=device).unsqueeze(0)
    mask = None
    if masked:
        # The last query of a piece sees the piece's last key; the ones before it see one key less each.
        last_visible = torch.minimum(num_keys - num_queries + query, num_keys - 1)
        mask = (key.unsqueeze(1) <= last_visible.unsqueeze(2)).unsqueeze(1)
    return _Stack(
        queries=query_start + torch.minimum(query, num_queries - 1),
        keys=key_start + torch.minimum(key, num_keys - 1),
        mask=mask,
        is_real=query < num_queries,
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Causal attention of each sequence over itself.

    query [T, heads, d]; key, value [T_keys, groups, d], groups dividing heads (T_keys = T without context
    parallelism, else the tokens of all ranks in global order); scale multiplies the scores. Returns [T, heads, d].
    """
    if layout.lengths is not None and len(set(layout.lengths)) == 1:
        q, k, v = (tensor.view(-1, layout.lengths[0], *tensor.shape[1:]) for tensor in (query, key, value))
        return _attend(q, k, v, None, scale).reshape(query.shape)
    if layout.lengths is not None:
        parts = zip(*(tensor.unsqueeze(0).split(layout.lengths, dim=1) for tensor in (query, key, value)), strict=True)
        return torch.cat([_attend(q, k, v, None, scale) for q, k, v in parts], dim=1).squeeze(0)
    outputs = []
    for stack in layout.stacks:
        # index_select, whose backward is one scatter-add, beats indexing by a 2-d tensor several times over.
        q = query.index_select(0, stack.queries.flatten()).view(*stack.queries.shape, *query.shape[1:])
        k = key.index_select(0, stack.keys.flatten()).view(*stack.keys.shape, *key.shape[1:])
        v = value.index_select(0, stack.keys.flatten()).view(*stack.keys.shape, *value.shape[1:])
        outputs.append(_attend(q, k, v, stack.mask, scale)[stack.is_real])
    if not outputs:
        return torch.zeros_like(query)
    output = torch.cat(outputs)
    return output if layout.order is None else output.index_select(0, layout.order)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[pieces, tokens, heads, d] -> the same."""
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)
