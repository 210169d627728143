"""Log lines and progress bars, from one rank."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from megatron_flowrl.config import LoggingConfig

logger = logging.getLogger("megatron_flowrl")


def configure_logging(settings: LoggingConfig, rank: int) -> None:
    """Print from rank 0 at the chosen level, from the others warnings only; quiet the libraries below that level.

    What Megatron-Core warns of when it is imported (no Apex, no Transformer Engine) the start-up line says better.
    """
    level = getattr(logging, settings.level.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    if settings.level != "debug":
        logging.getLogger("megatron").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"(megatron|transformer_engine|torch)\b.*")


@contextmanager
def progress(settings: LoggingConfig, rank: int, total: int, what: str) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps on rank 0, on a terminal only; yields the function that advances it by one."""
    shown = settings.progress and rank == 0 and sys.stderr.isatty()
    with tqdm(total=total, desc=what, disable=not shown, leave=False) as bar:
        yield lambda: bar.update() and None
