"""Two model replicas, of which the second is a second late at the end of a pass."""

from __future__ import annotations

import time

import pytest

from megatron_flowrl.config import LoggingConfig, ParallelConfig
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.ranks import RankWait, Stragglers


def main() -> None:
    """Every check is an assertion."""
    world = read_world()
    configure_logging(LoggingConfig(), world.rank)
    platform = current_platform(world.local_rank)
    initialize_process_groups(world, ParallelConfig(), platform, seed=1)
    wait = RankWait(platform)
    stragglers = Stragglers(platform)
    if world.rank == 1:
        time.sleep(1.0)
    wait.end()
    if world.rank == 0:
        assert 0.8 < wait.seconds < 20
    found = stragglers.measure(wait)
    assert found["speed/latest_rank_seconds"] > 0.7
    assert found["speed/rank_wait_seconds"] == pytest.approx(found["speed/latest_rank_seconds"] / 2, abs=0.2)
    assert found["speed/slowest_device_factor"] >= 1.0
    for _ in range(4):
        wait = RankWait(platform)
        if world.rank == 1:
            time.sleep(0.4)
        wait.end()
        stragglers.measure(wait)
    destroy_process_groups()


if __name__ == "__main__":
    main()
