"""A file that grows by whole pieces, also where the disk is full for a while."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class GrowingFile:
    """Pieces are at the end of the file whole, or not at all; a file that is there is gone on with.

    It is opened for every piece: what fails then is the piece, not the file, and the next one may succeed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size if path.exists() else 0

    def append(self, piece: bytes) -> None:
        """Hand `piece` to the operating system. Raises OSError, and then nothing of it stays."""
        with open(self.path, "ab", buffering=0) as file:
            # More than was written whole is the beginning of a piece that could not be taken back.
            if file.seek(0, os.SEEK_END) > self._size:
                file.truncate(self._size)
            begin = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(begin)
                raise
        self._size = begin + len(piece)


__all__ = ["GrowingFile"]
