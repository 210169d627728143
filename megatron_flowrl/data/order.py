"""In which order the rows of a data set are taken: another in every epoch, the same after a restart."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


class PromptOrder:
    """The order of `count` rows, over all epochs; it depends on its arguments alone."""

    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        self._count, self._seed, self._shuffle = count, seed, shuffle

    def take(self, position: int, n: int) -> list[int]:
        """Numbers of n rows, after `position` rows have been taken; an epoch is followed by the next."""
        return [
            _epoch(self._count, self._seed, place // self._count, self._shuffle)[place % self._count]
            for place in range(position, position + n)
        ]


@lru_cache(maxsize=4)
def _epoch(count: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    if not shuffle:
        return list(range(count))
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def derived_seed(*numbers: int) -> int:
    """A seed below 2^32 for each sequence of numbers, the same everywhere."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:4], "little")


__all__ = ["PromptOrder", "derived_seed"]
