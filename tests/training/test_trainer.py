"""How a step's answers are shared out to updates, and how long ranks wait for one another."""

from __future__ import annotations

import pytest

from megatron_flowrl.training.trainer import mini_batches


@pytest.mark.parametrize(
    ("groups", "prompts", "expected"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, [0, 0, 0, 0, 1, 1, 1, 1]),
        ([0, 1, 0, 1], 1, [0, 1, 0, 1]),  # wherever the answers stand
        ([5, 9, 7], 2, [0, 0, 1]),
        ([4, 4, 4], 32, [0, 0, 0]),
        ([], 2, []),
    ],
)
def test_answers_to_a_prompt_are_in_one_update(groups: list[int], prompts: int, expected: list[int]) -> None:
    assert mini_batches(groups, prompts) == expected


@pytest.mark.parametrize("count", range(1, 40))
def test_updates_are_of_nearly_equal_size(count: int) -> None:
    """Also where prompts were left out, so that no few of them weigh as much as many."""
    shares = mini_batches(range(count), 8)
    sizes = [shares.count(index) for index in range(max(shares) + 1)]
    assert len(sizes) == -(-count // 8)
    assert max(sizes) <= 8 and max(sizes) - min(sizes) <= 1
