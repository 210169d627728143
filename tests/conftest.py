"""Fixtures for every folder of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_flowrl.config import ParallelConfig
from megatron_flowrl.platform import Platform, cuda_stand_in, current_platform
from megatron_flowrl.platform.distributed import World, destroy_process_groups, initialize_process_groups


@pytest.fixture(scope="module")
def one_rank_platform() -> Iterator[Platform]:
    """This process's platform, with Megatron's process groups of one rank; all of it is gone after the module."""
    with torch.random.fork_rng(devices=[]):  # Megatron seeds torch's generator
        try:
            platform = current_platform()
            initialize_process_groups(World(), ParallelConfig(), platform, seed=1234)
            yield platform
        finally:
            destroy_process_groups()
            cuda_stand_in.uninstall()
            current_platform.cache_clear()
