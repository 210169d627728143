"""The zigzag cut against its definition, Transformer Engine's arithmetic and Megatron's rotary embedding."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flowrl.data.context_parallel import context_parallel_positions


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """(cu_seqlens, context_parallel_size)"""
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    chunks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    alignment = 2 * size if size > 1 else 1
    return tuple(accumulate((alignment * n for n in chunks), initial=0)), size


def transformer_engine_positions(cu_seqlens: tuple[int, ...], size: int, rank: int) -> list[int]:
    """What each thread of Transformer Engine's partition kernel computes for its local token."""
    local_starts = [boundary // size for boundary in cu_seqlens]
    positions = []
    for token in range(local_starts[-1]):
        sequence = max(i for i, start in enumerate(local_starts[:-1]) if start <= token)
        half = (local_starts[sequence + 1] - local_starts[sequence]) // 2
        index = token - local_starts[sequence]
        chunks_before = rank if index < half else 2 * (size - 1) - rank
        positions.append(index + local_starts[sequence] * size + half * chunks_before)
    return positions


def test_a_worked_example() -> None:
    cu_seqlens = (0, 8, 12)
    assert context_parallel_positions(cu_seqlens, 2, 0) == [0, 1, 6, 7, 8, 11]
    assert context_parallel_positions(cu_seqlens, 2, 1) == [2, 3, 4, 5, 9, 10]


@given(layouts())
def test_ranks_partition_the_micro_batch_evenly(layout: tuple[tuple[int, ...], int]) -> None:
    cu_seqlens, size = layout
    shards = [context_parallel_positions(cu_seqlens, size, rank) for rank in range(size)]
    assert sorted(position for shard in shards for position in shard) == list(range(cu_seqlens[-1]))
    assert {len(shard) for shard in shards} == {cu_seqlens[-1] // size}


@given(layouts())
def test_order_is_transformer_engines(layout: tuple[tuple[int, ...], int]) -> None:
    cu_seqlens, size = layout
    if size == 1:
        return
    for rank in range(size):
        assert context_parallel_positions(cu_seqlens, size, rank) == transformer_engine_positions(
            cu_seqlens, size, rank
        )


@pytest.mark.parametrize("size", [2, 4])
def test_order_is_that_of_megatrons_rotary_embedding(size: int) -> None:
    torch = pytest.importorskip("torch")
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    cu_seqlens = (0, 16, 24, 64)
    for rank in range(size):
        rows = [
            rope_utils._get_thd_freqs_on_this_cp_rank(
                rank, size, torch.empty((end - start) // size), torch.arange(cu_seqlens[-1]), offset=start
            )
            for start, end in pairwise(cu_seqlens)
        ]
        assert context_parallel_positions(cu_seqlens, size, rank) == torch.cat(rows).tolist()


def test_attention_work_is_even_over_ranks() -> None:
    keys_seen = [sum(p + 1 for p in context_parallel_positions((0, 64), 4, rank)) for rank in range(4)]
    assert len(set(keys_seen)) == 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="from 8 to 14 has 6 tokens"):
        context_parallel_positions((0, 8, 14), 2, 0)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"context_parallel_rank={rank} "):
            context_parallel_positions((0, 8), 2, rank)
