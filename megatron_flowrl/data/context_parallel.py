"""The zigzag cut of context parallelism: which tokens of a packed micro-batch a rank holds.

Under a causal mask the last tokens of a sequence see the most keys. So a sequence is cut into 2 x CP equal
chunks and rank r holds chunk r and its mirror image, chunk 2 x CP - 1 - r: attention work is even over ranks.

    CP = 2, one sequence: | 0 | 1 | 2 | 3 |    rank 0 holds chunks 0 and 3, rank 1 holds chunks 1 and 2

The local order is that of Transformer Engine (`thd_get_partitioned_indices`) and of Megatron's rotary
embedding (`_get_thd_freqs_on_this_cp_rank`): sequence by sequence, the early chunk before the late one.
"""

from collections.abc import Sequence
from itertools import pairwise


def context_parallel_positions(
    cu_seqlens: Sequence[int], context_parallel_size: int, context_parallel_rank: int
) -> list[int]:
    """Positions in the packed micro-batch that one rank holds, in local order: num_tokens / CP of them.

    Args:
        cu_seqlens: padded segment boundaries from 0 to num_tokens, tail included: `MicroBatch.cu_seqlens`.

    Raises:
        ValueError: the rank is out of range, or a segment is not a multiple of 2 x CP tokens.
    """
    if not 0 <= context_parallel_rank < context_parallel_size:
        raise ValueError(
            f"context_parallel_rank={context_parallel_rank} must be at least 0 and below "
            f"context_parallel_size={context_parallel_size}"
        )
    if context_parallel_size == 1:
        return list(range(cu_seqlens[-1]))
    num_chunks = 2 * context_parallel_size
    positions: list[int] = []
    for start, end in pairwise(cu_seqlens):
        chunk_tokens, rest = divmod(end - start, num_chunks)
        if rest:
            raise ValueError(
                f"the segment from {start} to {end} has {end - start} tokens, not a multiple of "
                f"2 x context_parallel_size = {num_chunks}: pad it to packing_alignment's sequence_alignment"
            )
        for chunk in (context_parallel_rank, num_chunks - 1 - context_parallel_rank):
            first = start + chunk * chunk_tokens
            positions.extend(range(first, first + chunk_tokens))
    return positions
