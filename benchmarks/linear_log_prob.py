"""Times linear_log_prob, forward and backward, and its memory, against the plain way through the logits.

    python benchmarks/linear_log_prob.py > linear_log_prob.json    the table goes to stderr

4,096 tokens, a vocabulary of 152,064 and hidden size 1,024, in bf16 and fp32: on one rank with all threads, and on two
tensor-parallel ranks of one thread (gloo, half of the vocabulary each; the slower rank's time, the larger memory). The
plain way is `plain_log_prob` on one rank and, on two, a product and Megatron's `vocab_parallel_cross_entropy`; both
take the logits to fp32. The two take turns, so that other load hits both.

Memory is what the process grows by at its highest (`VmHWM` of Linux, reset before each run), gradients included;
`working` is the same without them. Takes about five minutes and 16 GB.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from megatron_flowrl.ops.linear_log_prob import linear_log_prob, plain_log_prob

TOKENS, VOCABULARY, HIDDEN_SIZE, TEMPERATURE = 4096, 152_064, 1024, 0.8
CHUNK_BYTES = 64 << 20
NEEDED_BYTES = 6 * TOKENS * VOCABULARY * 4

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    forward_seconds: float
    backward_seconds: float
    peak_bytes: int
    """Above inputs."""

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Measurement:
    dtype: str
    tensor_model_parallel_size: int
    method: str
    fastest: Run
    """Of the slowest rank."""
    peak_bytes: int
    """Above inputs: the most of all runs and ranks."""
    gradient_bytes: int


def run_once(log_probs: LogProbs, hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    hidden.grad = weight.grad = None
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    result = log_probs(hidden, weight, labels)
    middle = time.perf_counter()
    result.backward(torch.full((TOKENS,), 1 / TOKENS))
    return Run(middle - start, time.perf_counter() - middle, memory("VmHWM") - before)


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def methods(rank: int, ranks: int, folder: str) -> dict[str, LogProbs]:
    """The op and the plain way, by name; for several ranks, in a tensor-parallel group that meets in `folder`."""
    options: dict[str, Any] = {"temperature": TEMPERATURE, "chunk_bytes": CHUNK_BYTES}

    def op(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_log_prob(hidden, weight, labels, **options)[0]

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain_log_prob(hidden, weight, labels, temperature=TEMPERATURE)[0]

    if ranks == 1:
        return {"linear_log_prob": op, "plain": plain}

    with warnings.catch_warnings(action="ignore"):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    options["tp_group"] = parallel_state.get_tensor_model_parallel_group()
    options["vocab_start"] = rank * VOCABULARY // ranks

    def megatron(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = (hidden @ weight.t()).float().div_(TEMPERATURE)
        return -vocab_parallel_cross_entropy(logits, labels)

    return {"linear_log_prob": op, "megatron": megatron}


def run_rank(rank: int, ranks: int, dtype: torch.dtype, repeats: int, folder: str) -> None:
    """Runs both methods in turns, and leaves the runs of this rank in `folder`."""
    if ranks > 1:
        torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN_SIZE, generator=random).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY // ranks, HIDDEN_SIZE, generator=random) / 40).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=random)
    runs: dict[str, list[Run]] = {}
    by_name = methods(rank, ranks, folder)
    for _ in range(repeats):
        for name, method in by_name.items():
            runs.setdefault(name, []).append(run_once(method, hidden, weight, labels))
    torch.save(runs, Path(folder, str(rank)))


def measure(dtype: torch.dtype, ranks: int, repeats: int) -> list[Measurement]:
    """Both methods, the op first."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (ranks, dtype, repeats, folder), nprocs=ranks)
        runs_of_ranks = [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(ranks)]
    return [
        Measurement(
            dtype=str(dtype).removeprefix("torch."),
            tensor_model_parallel_size=ranks,
            method=name,
            fastest=max(
                (min(runs[name], key=lambda run: run.seconds) for runs in runs_of_ranks), key=lambda run: run.seconds
            ),
            peak_bytes=max(run.peak_bytes for runs in runs_of_ranks for run in runs[name]),
            gradient_bytes=(TOKENS + VOCABULARY // ranks) * HIDDEN_SIZE * dtype.itemsize,
        )
        for name in runs_of_ranks[0]
    ]


def table(measurements: list[Measurement]) -> str:
    lines = [
        "dtype     TP  method            forward  backward       sum  of plain       peak  of plain    working",
    ]
    for op, plain in zip(measurements[::2], measurements[1::2], strict=True):
        for m in (op, plain):
            working = m.peak_bytes - m.gradient_bytes
            lines.append(
                f"{m.dtype:9} {m.tensor_model_parallel_size:2}  {m.method:15} {m.fastest.forward_seconds:7.2f} s "
                f"{m.fastest.backward_seconds:7.2f} s {m.fastest.seconds:7.2f} s "
                f"{m.fastest.seconds / plain.fastest.seconds:9.2f} {m.peak_bytes / 2**20:6.0f} MiB "
                f"{m.peak_bytes / plain.peak_bytes:9.3f} {working / 2**20:6.0f} MiB"
            )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu[0],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def current_commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip() if git.returncode == 0 else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default=current_commit())
    arguments = parser.parse_args()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < NEEDED_BYTES:
        sys.exit(f"the plain way needs {NEEDED_BYTES >> 30} GiB of free memory, and there are {available >> 30} GiB")
    header = {"commit": arguments.commit, "repeats": arguments.repeats, "chunk_bytes": CHUNK_BYTES, **machine()}
    measurements = [
        measurement
        for dtype in (torch.bfloat16, torch.float32)
        for ranks in (1, 2)
        for measurement in measure(dtype, ranks, arguments.repeats)
    ]
    print(table(measurements), file=sys.stderr)
    print(json.dumps({**header, "measurements": [asdict(m) for m in measurements]}, indent=2))


if __name__ == "__main__":
    main()
