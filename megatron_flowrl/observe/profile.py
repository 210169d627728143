"""Traces of chosen steps by torch's profiler, to be opened in Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from megatron_flowrl.config import TrackingConfig
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform import cuda_stand_in
from megatron_flowrl.platform.atomic import partial_path

_COMPRESSION = 5


@contextmanager
def profiled(settings: TrackingConfig, step: int, rank: int, folder: Path) -> Iterator[None]:
    """Write folder/profile/step_STEP_rank_RANK.json.gz of what happens inside, where the settings name both.

    Shapes and Python stacks are not recorded, for they would change what is measured. A trace that cannot be written
    is a warning; a step that ends in an error leaves none.
    """
    if step not in settings.profile_steps or rank not in settings.profile_ranks:
        yield
        return
    wanted = {ProfilerActivity.CPU} if cuda_stand_in.is_installed() else {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    with profile(activities=wanted & supported_activities()) as trace:
        yield
    path = folder / "profile" / f"step_{step}_rank_{rank}.json.gz"
    try:
        _write(trace, path)
    except (OSError, RuntimeError) as error:
        logger.warning("the trace %s could not be written: %s", path, error)
    else:
        logger.info("wrote the trace of step %d to %s", step, path)


def _write(trace: profile, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    plain, packed = (partial_path(path, f"{os.getpid()}{kind}") for kind in ("", ".gz"))
    try:
        trace.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(packed, "wb", _COMPRESSION) as target:
            shutil.copyfileobj(source, target)
        os.replace(packed, path)
    finally:
        for partial in (plain, packed):
            with contextlib.suppress(OSError):
                partial.unlink()


__all__ = ["profiled"]
