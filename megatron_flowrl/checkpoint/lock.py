"""A folder belongs to one run at a time."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from megatron_flowrl.config import UserError
from megatron_flowrl.observe.log import logger

_LOCK_FILE = ".lock"


def lock(folder: Path, use: str) -> IO[bytes]:
    """Keep other runs out of a folder, as long as this process lives and keeps what is returned.

    Raises UserError, with what the other run does there (`use`) and the cure, where one holds it.
    """
    file = (folder / _LOCK_FILE).open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder} is in use: {use}") from error
        logger.warning("%s cannot be locked (%s): see that no other run writes there", folder, error.strerror)
    return file


__all__ = ["lock"]
