"""A part of a Hugging Face tensor. Imports torch only: the sampler's processes use it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `stop` along dimension `dim` of the Hugging Face tensor `name`."""

    name: str
    dim: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the whole tensor, a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of this part of a tensor of the shape `whole`."""
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])
