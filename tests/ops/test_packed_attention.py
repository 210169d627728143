"""Packed attention against one sequence at a time, in fp64, and the context-parallel cut against the whole.

And the packed batch it works on: which rank predicts which token.
"""

from __future__ import annotations

import math
import random
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_flowrl.data.batch import TokenSequence, pack_batch
from megatron_flowrl.data.context_parallel import context_parallel_positions
from megatron_flowrl.data.packing import MicroBatch, PackingRules, packing_alignment, plan_packing
from megatron_flowrl.ops import packed_attention as module
from megatron_flowrl.ops.packed_attention import attention_layout, packed_attention

HEAD_DIM = 8
RAGGED = [
    [1],
    [17],
    [1, 1, 1],
    [5, 5, 5, 5],
    [9, 1, 30, 30, 29, 2, 70, 1],
    [64, 63, 60, 51, 12, 11, 10, 3],
    [0, 4, 0, 0, 7, 0],
    [130],
    [128, 128],
    [1, 300, 0, 140, 2, 200],
]


def boundaries_of(lengths: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def random_lengths(seed: int, multiple: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [
        multiple * draw.choice([1, 2, draw.randint(1, 20), draw.randint(1, 60)]) for _ in range(draw.randint(2, 15))
    ]


def inputs(tokens: int, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, key and value as leaves."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = (heads, groups, groups)
    return [
        torch.randn((tokens, n, HEAD_DIM), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in sizes
    ]


def by_sequence(query: Tensor, key: Tensor, value: Tensor, boundaries: tuple[int, ...], scale: float) -> Tensor:
    """The definition: softmax of the scores of the tokens so far, head by head."""
    outputs = [query.new_zeros((0, *query.shape[1:]))]
    heads_per_group = query.shape[1] // key.shape[1]
    for start, end in pairwise(boundaries):
        length, of_heads = end - start, []
        later = torch.ones((length, length), dtype=torch.bool).triu(1)
        for head in range(query.shape[1]):
            group = head // heads_per_group
            scores = scale * query[start:end, head] @ key[start:end, group].t()
            of_heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ value[start:end, group])
        outputs.append(torch.stack(of_heads, dim=1))
    return torch.cat(outputs)


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    factor = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((output * factor).sum(), leaves))


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert torch.allclose(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", [*RAGGED, *(random_lengths(seed) for seed in range(12))])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_forward_and_gradients_equal_one_sequence_at_a_time(lengths: list[int], heads: int, groups: int) -> None:
    boundaries, leaves = boundaries_of(lengths), inputs(sum(lengths), heads, groups)
    actual = packed_attention(*leaves, attention_layout(boundaries), scale=0.3)
    expected = by_sequence(*leaves, boundaries, scale=0.3)
    assert_equal([actual], [expected])
    assert_equal(gradients(actual, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("lengths", [[200], [150, 0, 300], [1, 256, 256]])
def test_long_sequences_are_not_gathered(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of their queries, keys and values would cost memory and time: each is a view of what came in."""
    seen: list[tuple[Tensor, ...]] = []

    def attend(*tensors: Any) -> Tensor:
        seen.append(tensors[:3])
        return original(*tensors)

    original = module._attend
    monkeypatch.setattr(module, "_attend", attend)
    leaves = inputs(sum(lengths), 4, 2)
    packed_attention(*leaves, attention_layout(boundaries_of(lengths)), scale=0.3)
    assert len(seen) == sum(length > 0 for length in lengths)
    for tensors in seen:
        for tensor, leaf in zip(tensors, leaves, strict=True):
            assert tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()


def test_ragged_sequences_share_calls() -> None:
    """Lengths near one another are stacked; one call a sequence would do for none of it."""
    layout = attention_layout(boundaries_of([64, 63, 60, 58, 12, 11, 10, 9]))
    assert len(layout.stacks) == 2
    assert sum(stack.is_real.numel() for stack in layout.stacks) < 1.2 * 287


def test_tokens_keep_their_places() -> None:
    """The output is in the order of the input, whatever order the stacks are in."""
    lengths = [3, 50, 7, 20]
    tokens = sum(lengths)
    value = torch.arange(tokens, dtype=torch.float64).view(tokens, 1, 1).expand(tokens, 1, HEAD_DIM)
    only_itself = torch.zeros((tokens, 1, HEAD_DIM), dtype=torch.float64)
    output = packed_attention(only_itself, only_itself, value, attention_layout(boundaries_of(lengths)), scale=1.0)
    # Equal scores: the mean of the positions so far.
    expected = [start + i / 2 for start, end in pairwise(boundaries_of(lengths)) for i in range(end - start)]
    assert torch.allclose(output[:, 0, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    lengths = random_lengths(3)
    leaves = inputs(sum(lengths), 4, 2, dtype)
    output = packed_attention(*leaves, attention_layout(boundaries_of(lengths)), scale=0.3)
    assert output.dtype == dtype
    expected = by_sequence(*(leaf.double() for leaf in leaves), boundaries_of(lengths), scale=0.3)
    assert (output.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_the_ranks_of_context_parallelism_make_up_the_whole(cp_size: int, seed: int, heads: int, groups: int) -> None:
    """Each rank has its queries and all keys; together they give the whole, and its gradients in their sum."""
    boundaries = boundaries_of(random_lengths(seed, multiple=2 * cp_size))
    leaves = inputs(boundaries[-1], heads, groups)
    expected = by_sequence(*leaves, boundaries, scale=0.3)

    query, key, value = leaves
    whole = torch.zeros_like(expected)
    for rank in range(cp_size):
        local = torch.tensor(context_parallel_positions(boundaries, cp_size, rank))
        layout = attention_layout(boundaries, rank, cp_size)
        whole = whole.index_add(0, local, packed_attention(query[local], key, value, layout, scale=0.3))
    assert_equal([whole], [expected])
    assert_equal(gradients(whole, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_edges(cp_size: int) -> None:
    """Chunks of one token, and a sequence without any."""
    boundaries = boundaries_of([2 * cp_size, 0, 2 * cp_size, 0])
    query, key, value = inputs(boundaries[-1], 2, 2)
    expected = by_sequence(query, key, value, boundaries, scale=1.0)
    for rank in range(cp_size):
        local = torch.tensor(context_parallel_positions(boundaries, cp_size, rank))
        actual = packed_attention(query[local], key, value, attention_layout(boundaries, rank, cp_size), scale=1.0)
        assert_equal([actual], [expected[local]])


# Prompts and responses of one token, empty responses, and the token id 0 are among them.
SEQUENCES = [
    TokenSequence((0,), ()),
    TokenSequence((7,), (0,)),
    TokenSequence((1, 2, 3), (0, 0)),
    TokenSequence((5,), tuple(range(40))),
    TokenSequence(tuple(range(33)), (9,)),
    *(TokenSequence(tuple(range(n)), tuple(range(100, 100 + 3 * n))) for n in range(1, 12)),
]


def micro_batches(cp_size: int, alignment: int = 1) -> list[MicroBatch]:
    """`SEQUENCES` under a small budget."""
    of_sequence, of_micro_batch = packing_alignment(alignment, cp_size, sequence_parallel=alignment > 1)
    rules = PackingRules(
        data_parallel_size=2,
        tokens_per_micro_batch=96,
        sequence_alignment=of_sequence,
        micro_batch_alignment=of_micro_batch,
    )
    return list(plan_packing([len(sequence) for sequence in SEQUENCES], rules).micro_batches)


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_each_response_token_is_predicted_once(cp_size: int, alignment: int) -> None:
    """By the token before it, on one of the ranks, with its own number in its own sequence."""
    predicted = []
    for micro_batch in micro_batches(cp_size, alignment):
        starts = dict(zip(micro_batch.sequences, micro_batch.cu_seqlens, strict=False))
        for rank in range(cp_size):
            batch = pack_batch(SEQUENCES, micro_batch, cp_rank=rank, cp_size=cp_size)
            local = context_parallel_positions(micro_batch.cu_seqlens, cp_size, rank)
            assert batch.num_sequences == len(micro_batch.sequences)
            assert len(batch.rows) == len(batch.labels) == len(batch.sequence_of_row) == len(batch.response_index)
            for row, label, number, index in zip(
                batch.rows.tolist(), batch.labels.tolist(), batch.sequence_of_row.tolist(),
                batch.response_index.tolist(), strict=True,
            ):  # fmt: skip
                sequence = batch.sequences[number]
                assert label == SEQUENCES[sequence].response[index]
                assert local[row] == starts[sequence] + len(SEQUENCES[sequence].prompt) + index - 1
                predicted.append((sequence, index))
    assert sorted(predicted) == [(i, index) for i, s in enumerate(SEQUENCES) for index in range(len(s.response))]


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_ranks_hold_the_tokens_of_their_positions(cp_size: int, alignment: int) -> None:
    for micro_batch in micro_batches(cp_size, alignment):
        tokens, positions = [-1] * micro_batch.num_tokens, [-1] * micro_batch.num_tokens
        for rank in range(cp_size):
            batch = pack_batch(SEQUENCES, micro_batch, cp_rank=rank, cp_size=cp_size)
            assert batch.boundaries == micro_batch.cu_seqlens
            assert batch.input_ids.shape == batch.position_ids.shape == (1, micro_batch.num_tokens // cp_size)
            for place, global_place in enumerate(context_parallel_positions(micro_batch.cu_seqlens, cp_size, rank)):
                tokens[global_place] = int(batch.input_ids[0, place])
                positions[global_place] = int(batch.position_ids[0, place])
        for start, end in pairwise(micro_batch.cu_seqlens):
            assert positions[start:end] == list(range(end - start))
        for index, start in zip(micro_batch.sequences, micro_batch.cu_seqlens, strict=False):
            whole = [*SEQUENCES[index].prompt, *SEQUENCES[index].response]
            assert tokens[start : start + len(whole)] == whole
        assert -1 not in tokens


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a_filler_predicts_nothing(cp_size: int) -> None:
    filler = MicroBatch(sequences=(), lengths=(), padded_lengths=(), tail=2 * cp_size)
    for rank in range(cp_size):
        batch = pack_batch(SEQUENCES, filler, cp_rank=rank, cp_size=cp_size)
        assert batch.num_sequences == len(batch.rows) == len(batch.labels) == 0
        assert batch.input_ids.shape == (1, 2)
        assert batch.labels.dtype == batch.rows.dtype == batch.sequence_of_row.dtype == torch.int64
