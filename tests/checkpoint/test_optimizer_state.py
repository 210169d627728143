"""Ranges of flattened parameters as rectangles of whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_flowrl.checkpoint.optimizer_state import _pieces_of, _Range, _rectangles


def sharded(data: torch.Tensor, global_shape: tuple[int, ...], offset: tuple[int, ...], **more: Any) -> ShardedTensor:
    return ShardedTensor("key", data, data.dtype, tuple(data.shape), global_shape, offset, None, (0, 0, 1), **more)


def assembled(piece_of: Any, values: torch.Tensor, cuts: list[int], vocab_size: int = 10**9) -> torch.Tensor:
    """The whole tensor from the rectangles of ranges of `values`, NaN where nothing was given."""
    parameter = torch.empty(values.numel())
    whole: torch.Tensor | None = None
    for start, stop in zip([0, *cuts], [*cuts, values.numel()], strict=True):
        held = _Range(parameter, start, stop, {}, replicated=False)
        for piece in _pieces_of(piece_of):
            for part in _rectangles("optimizer.x.", values[start:stop], held, piece, vocab_size):
                assert part.key == "optimizer.x.key" and part.replica_id == (0, 0, 0)
                if whole is None:
                    whole = torch.full(part.global_shape, float("nan"))
                place = whole[part.global_slice()]
                assert place.isnan().all() and part.data.shape == place.shape
                place.copy_(part.data)
    assert whole is not None
    return whole


@pytest.mark.parametrize("cuts", [[], [7], [3, 4], [5, 10], [1, 2, 14], [0, 15]])
def test_a_matrix_in_ranges(cuts: list[int]) -> None:
    values = torch.arange(15.0)
    found = assembled(sharded(torch.empty(3, 5), (3, 5), (0, 0)), values, cuts)
    assert torch.equal(found, values.view(3, 5))


@pytest.mark.parametrize("cuts", [[], [2], [4]])
def test_a_part_of_a_tensor_with_a_layer_axis(cuts: list[int]) -> None:
    values = torch.arange(4.0)
    found = assembled(sharded(torch.empty(2, 2), (3, 2, 4), (1, 0, 2), prepend_axis_num=1), values, cuts)
    assert torch.equal(found[1, :, 2:], values.view(2, 2))
    assert found.isnan().sum() == 3 * 2 * 4 - 4


def test_a_vector() -> None:
    found = assembled(sharded(torch.empty(4), (8,), (4,)), torch.arange(4.0), [1, 3])
    assert torch.equal(found[4:], torch.arange(4.0)) and found[:4].isnan().all()


@pytest.mark.parametrize("vocab_size, rows", [(8, 4), (6, 2), (4, 0), (3, 0)])
def test_padding_of_the_vocabulary_is_left_out(vocab_size: int, rows: int) -> None:
    """The second of two ranks with four rows each."""
    data = torch.empty(4, 2)
    piece = sharded(data, (8, 2), (4, 0), allow_shape_mismatch=True)
    parts = [
        part
        for start, stop in ((0, 3), (3, 8))
        for part in _rectangles(
            "", torch.arange(8.0)[start:stop], _Range(data, start, stop, {}, False), _pieces_of(piece)[0], vocab_size
        )
    ]
    assert sum(part.data.numel() for part in parts) == 2 * rows
    assert all(part.global_shape == (vocab_size, 2) for part in parts)


def test_pieces_are_told_apart_whatever_storage_they_have() -> None:
    """A quantised weight's pieces have storage of their own, so that their offsets there say nothing."""

    def build(key: str, data: torch.Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        gate, up = (part.clone() for part in data.chunk(2))
        return [sharded(gate, (4, 3), (0, 0)), sharded(up, (4, 3), (2, 0))]

    factory = ShardedTensorFactory("key", torch.empty(4, 3), build, lambda parts: parts, (0, 0, 1))
    values = torch.arange(12.0)
    assert torch.equal(assembled(factory, values, [5, 7]), values.view(4, 3))
