"""The tiles of logits that `linear_log_prob` walks over, within a budget of bytes.

Letters in names are dimensions: N tokens, R of them in a block of rows, V rows of the weight, C of them in a tile
(the columns of its logits), h hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from megatron_flowrl.ops.matmul import Matmul

# Name -> dimensions ("Rh", "Ch" or "RC") and dtype.
Buffers = dict[str, tuple[str, torch.dtype]]

# Each block of rows reads and casts the whole weight: with this many rows that is little beside the products.
_MAX_ROWS = 4096
# Narrower tiles would read the buffers of a block of rows too often.
_MIN_COLUMNS = 256
# On a CPU wider tiles are slower, for they leave its cache; on a GPU a tile has to outlast the launch of its kernels.
_MAX_COLUMNS_ON_CPU = 512
_MAX_COLUMNS = 8192
_COLUMN_MULTIPLE = 64
# Room for the smallest tile with all the buffers there are. Checked in the forward pass for the backward pass.
CHUNK_BYTES_PER_HIDDEN = 32


class Tiles:
    """The tiles of one direction, and its working buffers: all allocated here once, and `chunk_bytes` together.

    Allocating a tile anew each time would cost more on a CPU than multiplying it: the pages of large tensors go back
    to the system and come back as page faults. `vocabulary` rows of the weight take part, the others are padding.
    """

    def __init__(
        self,
        matmul: Matmul,
        hidden: Tensor,
        weight: Tensor,
        *,
        vocabulary: int,
        chunk_bytes: int,
        extra_buffers: Buffers | None = None,
    ) -> None:
        self._matmul, self._hidden, self._weight = matmul, hidden, weight
        tokens, hidden_size = hidden.shape
        # "exp" is there without an entropy too: a shape that depended on it would change the last bit of log-probs.
        buffers: Buffers = {"logits": ("RC", matmul.result_dtype), "exp": ("RC", matmul.result_dtype)}
        buffers |= extra_buffers or {}
        if matmul.factor_dtype != hidden.dtype:
            buffers |= {"hidden": ("Rh", matmul.factor_dtype), "weight": ("Ch", matmul.factor_dtype)}
        row, column, cell = (_bytes(buffers, dimensions) for dimensions in ("Rh", "Ch", "RC"))
        block_rows, tile_columns = tile_shape(
            tokens,
            vocabulary,
            max_columns=_MAX_COLUMNS_ON_CPU if hidden.device.type == "cpu" else _MAX_COLUMNS,
            row_bytes=row * hidden_size,
            column_bytes=column * hidden_size,
            cell_bytes=cell,
            chunk_bytes=chunk_bytes,
        )
        self.row_blocks = _slices(tokens, block_rows)
        self.column_tiles = _slices(vocabulary, tile_columns)
        size = {"R": block_rows, "C": tile_columns, "h": hidden_size}
        self._buffers = {
            name: torch.empty(prod(size[letter] for letter in dimensions), dtype=dtype, device=hidden.device)
            for name, (dimensions, dtype) in buffers.items()
        }

    def hidden(self, rows: slice) -> Tensor:
        return self.factor("hidden", self._hidden[rows])

    def weight(self, columns: slice) -> Tensor:
        return self.factor("weight", self._weight[columns])

    def logits(self, hidden_Rh: Tensor, weight_Ch: Tensor) -> tuple[Tensor, Tensor]:
        """A tile of logits, and an uninitialised one of the same shape to work with."""
        shape = torch.Size((hidden_Rh.shape[0], weight_Ch.shape[0]))
        logits_RC = self._matmul.product(hidden_Rh, weight_Ch.t(), out=self._view("logits", shape))
        return logits_RC, self._view("exp", shape)

    def factor(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` as a product wants it: itself, or cast into the buffer `name`."""
        if tensor.dtype == self._matmul.factor_dtype:
            return tensor
        return self._view(name, tensor.shape).copy_(tensor)

    @contextmanager
    def widened(self, name: str, gradient: Tensor | None, part: slice) -> Iterator[Tensor | None]:
        """Yields `gradient[part]` to add to: itself, or a wide copy in the buffer `name`, rounded back at the end."""
        if gradient is None or gradient.dtype == self._matmul.result_dtype:
            yield None if gradient is None else gradient[part]
        else:
            wide = self._view(name, gradient[part].shape).copy_(gradient[part])
            yield wide
            gradient[part] = wide

    def add_product(self, scratch: str, into: Tensor | None, a: Tensor, b: Tensor) -> None:
        """into += a @ b, if it is wanted. `scratch` names the buffer for the product where it needs one."""
        if into is not None:
            in_place = self._matmul.adds_in_place
            self._matmul.add_product(into, a, b, scratch=None if in_place else self._view(scratch, into.shape))

    def _view(self, name: str, shape: torch.Size) -> Tensor:
        return self._buffers[name][: prod(shape)].view(shape)


def tile_shape(
    tokens: int,
    vocabulary: int,
    *,
    max_columns: int,
    row_bytes: int,
    column_bytes: int,
    cell_bytes: int,
    chunk_bytes: int,
) -> tuple[int, int]:
    """Rows and columns of a tile with rows * row_bytes + columns * column_bytes + cells * cell_bytes <= chunk_bytes.

    As many rows as possible, while there is room for some columns; then as many columns as are possible and useful. At
    least one of each, also for no tokens or no ids. `chunk_bytes` must be twice what a tile of one cell takes, or more.
    """
    assert chunk_bytes >= 2 * (row_bytes + column_bytes + cell_bytes)
    some_columns = max(1, min(_MIN_COLUMNS, vocabulary, chunk_bytes // 2 // (column_bytes + cell_bytes)))
    most_rows = (chunk_bytes - some_columns * column_bytes) // (row_bytes + some_columns * cell_bytes)
    rows = _even_step(tokens, min(_MAX_ROWS, most_rows))
    most_columns = min(max_columns, (chunk_bytes - rows * row_bytes) // (column_bytes + rows * cell_bytes))
    if most_columns > _COLUMN_MULTIPLE:
        most_columns -= most_columns % _COLUMN_MULTIPLE
    return rows, max(1, min(vocabulary, most_columns))


def _bytes(buffers: Buffers, dimensions: str) -> int:
    return sum(dtype.itemsize for of_buffer, dtype in buffers.values() if of_buffer == dimensions)


def _even_step(length: int, longest: int) -> int:
    """The step that covers `length` in as few steps as `longest` does, in equal ones."""
    steps = -(-length // longest)
    return -(-length // steps) if steps else 1


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
