"""What every folder of tests shares. Imports torch only where a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megatron_flowrl.platform import Platform

# On tensors this small threads only wait for one another: up to thirty times as long on a machine that others use.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# These are the CPU's tests, also on a machine with a GPU; those of tests/gpu use what was visible.
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where two run at once, the last one to end is then a short one."""
    slow = {item.path for item in items if item.get_closest_marker("distributed") is not None}

    def place(item: pytest.Item) -> int:
        return 0 if {"slurm", "end_to_end"} & {*item.path.parts} else 1 if item.path in slow else 2

    items.sort(key=place)


@pytest.fixture(scope="module")
def one_rank_platform() -> Iterator[Platform]:
    """This process's platform, with Megatron's process groups of one rank; all of it is gone after the module."""
    import torch

    from megatron_flowrl.config import ParallelConfig
    from megatron_flowrl.platform import cuda_stand_in, current_platform
    from megatron_flowrl.platform.distributed import World, destroy_process_groups, initialize_process_groups

    with torch.random.fork_rng(devices=[]):  # Megatron seeds torch's generator
        try:
            platform = current_platform()
            initialize_process_groups(World(), ParallelConfig(), platform, seed=1234)
            yield platform
        finally:
            destroy_process_groups()
            cuda_stand_in.uninstall()
            current_platform.cache_clear()


@pytest.fixture(scope="module")
def process_as_it_was() -> Iterator[None]:
    """What `main` leaves in a process that goes on: the CUDA stand-in, log handlers, seeds."""
    import logging
    import warnings

    import torch

    from megatron_flowrl.platform import cuda_stand_in, current_platform
    from megatron_flowrl.platform.distributed import destroy_process_groups

    ours, megatron = logging.getLogger("megatron_flowrl"), logging.getLogger("megatron")
    before = list(ours.handlers), ours.propagate, ours.level, megatron.level
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        yield
    ours.handlers, ours.propagate = before[0], before[1]
    ours.setLevel(before[2])
    megatron.setLevel(before[3])
    destroy_process_groups()  # only where a test has failed
    cuda_stand_in.uninstall()
    current_platform.cache_clear()
