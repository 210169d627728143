"""Times the packing plan and compares it with first-fit in order of arrival.

    python benchmarks/packing.py > packing.json    the table goes to stderr

Lengths are log-normal with mean 1500 before a cap of 8192, from a fixed seed, in mini-batches of 512 over
eight data-parallel ranks, at TP 4 with sequence parallelism and CP 2. The naive plan deals sequences to ranks
in turn, each into its rank's first micro-batch with room; then fillers bring all ranks to the same count.
"""

import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from megatron_flowrl.data.packing import (
    MicroBatch,
    PackingPlan,
    PackingRules,
    packing_alignment,
    plan_packing,
)

MINI_BATCH = 512
REPEATS = 5


@dataclass(frozen=True)
class Measurement:
    sequences: int
    method: str
    milliseconds: float
    """Fastest of REPEATS."""
    micro_batches_per_rank: float
    """Mean over mini-batches."""
    efficiency: float
    imbalance: float


def response_lengths(count: int, mean: float = 1500, sigma: float = 0.9, cap: int = 8192) -> list[int]:
    draw = random.Random(0)
    mu = math.log(mean) - sigma**2 / 2
    return [min(cap, max(1, round(draw.lognormvariate(mu, sigma)))) for _ in range(count)]


def first_fit_in_order(lengths: list[int], rules: PackingRules, mini_batch_of: list[int]) -> PackingPlan:
    """Sequences dealt to ranks in turn, each into its rank's first micro-batch with room."""
    num_ranks = rules.data_parallel_size
    bins: list[list[list[list[int]]]] = [[[] for _ in range(num_ranks)] for _ in range(max(mini_batch_of) + 1)]
    rooms: list[list[list[int]]] = [[[] for _ in range(num_ranks)] for _ in bins]
    for i, m in enumerate(mini_batch_of):
        rank_bins, rank_rooms = bins[m][i % num_ranks], rooms[m][i % num_ranks]
        tokens = rules.padded_length(lengths[i])
        b = next((b for b, room in enumerate(rank_rooms) if room >= tokens), len(rank_bins))
        if b == len(rank_bins):
            rank_bins.append([])
            rank_rooms.append(rules.longest_sequence)
        rank_bins[b].append(i)
        rank_rooms[b] -= tokens
    for ranks in bins:
        longest = max(map(len, ranks))
        for rank in ranks:
            rank.extend([] for _ in range(longest - len(rank)))

    def micro_batch(sequences: list[int]) -> MicroBatch:
        padded_lengths = tuple(rules.padded_length(lengths[i]) for i in sequences)
        tail = rules.tail(sum(padded_lengths))
        return MicroBatch(tuple(sequences), tuple(lengths[i] for i in sequences), padded_lengths, tail)

    return PackingPlan(tuple(tuple(tuple(map(micro_batch, rank)) for rank in ranks) for ranks in bins), rules)


def measure(
    method: str,
    plan_of: Callable[[list[int], PackingRules, list[int]], PackingPlan],
    lengths: list[int],
    rules: PackingRules,
) -> Measurement:
    mini_batch_of = [i // MINI_BATCH for i in range(len(lengths))]
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        plan = plan_of(lengths, rules, mini_batch_of)
        seconds.append(time.perf_counter() - start)
    return Measurement(
        sequences=len(lengths),
        method=method,
        milliseconds=round(1e3 * min(seconds), 2),
        micro_batches_per_rank=len(plan.micro_batches) / rules.data_parallel_size / len(plan.mini_batches),
        efficiency=round(plan.efficiency, 5),
        imbalance=round(plan.imbalance, 4),
    )


def main() -> None:
    sequence_alignment, micro_batch_alignment = packing_alignment(4, 2, sequence_parallel=True)
    rules = PackingRules(
        data_parallel_size=8,
        tokens_per_micro_batch=16384,
        sequence_alignment=sequence_alignment,
        micro_batch_alignment=micro_batch_alignment,
    )
    measurements = []
    print(
        f"{'sequences':>9}  {'method':<18} {'ms':>8} {'per rank':>8} {'real':>7} {'imbalance':>9}",
        file=sys.stderr,
    )
    for count in (512, 4096, 16384):
        for method, plan_of in (("planned", plan_packing), ("first fit in order", first_fit_in_order)):
            m = measure(method, plan_of, response_lengths(count), rules)
            measurements.append(m)
            print(
                f"{m.sequences:>9}  {m.method:<18} {m.milliseconds:>8.2f} {m.micro_batches_per_rank:>8.2f} "
                f"{m.efficiency:>7.2%} {m.imbalance:>9.4f}",
                file=sys.stderr,
            )
    report = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "rules": asdict(rules),
        "sequences_per_mini_batch": MINI_BATCH,
        "measurements": [asdict(m) for m in measurements],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
