"""What autograd holds: the bytes of distinct tensors that are saved for backward passes, now and at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Held:
    """`peak` and `now`, in bytes of storages, each counted once, without those of `ignored` (parameters)."""

    def __init__(self, ignored: Collection[Tensor]) -> None:
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._saved: Counter[int] = Counter()
        self.now = self.peak = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what is saved in the block, until its graph is gone."""
        with torch.autograd.graph.saved_tensors_hooks(_Saved.of(self), _Saved.back):
            yield

    def add(self, place: int, size: int) -> None:
        if place in self._ignored:
            return
        self._saved[place] += 1
        if self._saved[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)

    def remove(self, place: int, size: int) -> None:
        if place in self._ignored:
            return
        self._saved[place] -= 1
        if self._saved[place] == 0:
            self.now -= size


class _Saved:
    """A tensor in autograd's hands."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self._held, self.tensor = held, tensor
        storage = tensor.untyped_storage()
        self._place, self._size = storage.data_ptr(), storage.nbytes()
        held.add(self._place, self._size)

    def __del__(self) -> None:
        self._held.remove(self._place, self._size)

    @staticmethod
    def of(held: Held) -> Callable[[Tensor], _Saved]:
        return lambda tensor: _Saved(held, tensor)

    @staticmethod
    def back(saved: _Saved) -> Tensor:
        return saved.tensor
