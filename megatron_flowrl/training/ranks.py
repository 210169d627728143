"""What ranks wait for one another in a step, and which of them hold the others up."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform import Platform

_SLOW = {"cuda": 1.3, "cpu": 2.0}  # times the median of all ranks; cores are shared with others
_LATE = 0.1  # share of the passes' time
_IN_A_ROW = 5  # steps, before anything is said
_PRODUCTS = {"cuda": (2048, 50, torch.bfloat16), "cpu": (256, 5, torch.float32)}  # side, how many, format
_TRIES = 3


class RankWait:
    """Listens to passes; adds up how long a rank stands at their ends until the others are there.

    That is uneven work, a slow rank, or the place in the pipeline. `on_progress` hears of each micro-batch, and of the
    beginning and the end of a wait: whether this rank waits now.
    """

    def __init__(self, platform: Platform, on_progress: Callable[[bool], object] = lambda _: None) -> None:
        self._platform, self._on_progress = platform, on_progress
        self.seconds, self._began = 0.0, time.perf_counter()

    def micro_batch(self) -> None:
        """A micro-batch's forward pass is done."""
        self._on_progress(False)

    def end(self) -> None:
        """This rank's micro-batches are done."""
        self._platform.synchronize()
        began = time.perf_counter()
        self._on_progress(True)  # whoever waits for a slow rank does not hang
        dist.barrier()
        self._on_progress(False)
        self.seconds += time.perf_counter() - began

    def elapsed(self) -> float:
        """Seconds since the first pass began."""
        return time.perf_counter() - self._began


@dataclass(frozen=True)
class Standing:
    """Of one rank in one step, in seconds.

    late: how much less it waited at the ends of passes than the ranks that have its place in the other model replicas,
    by their median; 0 where there are none. probe: matrix products of its own.
    """

    waited: float
    late: float
    probe: float


class Stragglers:
    """Names ranks that are slow for several steps. All ranks construct it together and ask together.

    Collectives make all ranks of a model replica equally late, so that lateness tells replicas apart, not their ranks;
    products that need nobody else tell devices apart.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        hosts = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        self._history = History(hosts, _SLOW[platform.device.type])

    def measure(self, wait: RankWait) -> dict[str, float]:
        """Metrics of this step; rank 0 says which ranks are slow."""
        elapsed, device = wait.elapsed(), self._platform.device
        waited = torch.tensor([wait.seconds], dtype=torch.float64, device=device)
        peers = parallel_state.get_data_parallel_group()
        of_peers = [torch.empty_like(waited) for _ in range(peers.size())]
        dist.all_gather(of_peers, waited, group=peers)
        others = [float(one) for rank, one in enumerate(of_peers) if rank != peers.rank()]
        late = median(others) - wait.seconds if others else 0.0
        own = torch.tensor([wait.seconds, late, self._probe()], dtype=torch.float64, device=device)
        all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, own)
        standings = [Standing(*one.tolist()) for one in all_ranks]
        lines = self._history.add(standings, elapsed)
        for line in lines if dist.get_rank() == 0 else ():  # all ranks find the same
            logger.warning("%s", line)
        probes = [one.probe for one in standings]
        return {
            "speed/rank_wait_seconds": sum(one.waited for one in standings) / len(standings),
            "speed/latest_rank_seconds": max(one.late for one in standings),
            "speed/slowest_device_factor": max(probes) / median(probes),
        }

    def _probe(self) -> float:
        """Seconds for some matrix products; draws no random numbers."""
        side, count, dtype = _PRODUCTS[self._platform.device.type]
        left = torch.linspace(-1, 1, side * side, device=self._platform.device).view(side, side).to(dtype)
        result, best = torch.empty_like(left), float("inf")
        for _ in range(_TRIES):
            self._platform.synchronize()
            began = time.perf_counter()
            for _ in range(count):
                torch.mm(left, left, out=result)
            self._platform.synchronize()
            best = min(best, time.perf_counter() - began)
        return best


class History:
    """The last steps' standings, and what follows from them."""

    def __init__(self, hosts: Sequence[str], slow: float) -> None:
        self._hosts, self._slow = hosts, slow
        self._slow_ranks: deque[set[int]] = deque(maxlen=_IN_A_ROW)
        self._late_ranks: deque[set[int]] = deque(maxlen=_IN_A_ROW)
        self._said: set[tuple[str, int]] = set()

    def add(self, standings: Sequence[Standing], elapsed: float) -> list[str]:
        """What is to be said after one more step: a rank that goes on being slow is named once, until it recovers."""
        usual = median(one.probe for one in standings)
        self._slow_ranks.append({rank for rank, one in enumerate(standings) if one.probe > self._slow * usual})
        self._late_ranks.append({rank for rank, one in enumerate(standings) if one.late > _LATE * elapsed})
        found = {("slow", rank) for rank in _always(self._slow_ranks)}
        found |= {("late", rank) for rank in _always(self._late_ranks)}
        new, self._said = found - self._said, found
        lines = []
        for kind, rank in sorted(new):
            one = standings[rank]
            if kind == "slow":
                what = f"its own matrix products take {one.probe / usual:.1f} times the median: a slow device"
            else:
                what = (
                    f"others wait {one.late:.1f} s of {elapsed:.1f} s for its model replica: a slow rank in it, or "
                    "more work than others have (plan/imbalance)"
                )
            lines.append(f"straggler: rank {rank} on {self._hosts[rank]}, {_IN_A_ROW} steps in a row: {what}")
        return lines


def _always(steps: deque[set[int]]) -> set[int]:
    return set.intersection(*steps) if len(steps) == _IN_A_ROW else set()


__all__ = ["History", "RankWait", "Standing", "Stragglers"]
