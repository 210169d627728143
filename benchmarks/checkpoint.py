"""Times import, export and stream of a model over two tensor-parallel ranks, and what a save costs a training step.

    python benchmarks/checkpoint.py > checkpoint.json    the table goes to stderr

A random Qwen2 of about 500 M parameters in bf16, two gloo ranks of one thread. Memory is the largest anonymous memory
of a rank (RssAnon of Linux, sampled every 2 ms) above what it was before, without files that are mapped. The yardstick
of speed is one copy of the same bytes by one rank, made in the same run.

`save` is of a smaller model's whole training state (weights, Adam, in bf16 with fp32 main weights), data-parallel over
the two ranks: the time until training may go on, and until all is on disk, asynchronous and not. Takes a few minutes,
and 12 GB of disk in the folder for temporary files (`TMPDIR`).
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from _report import circumstances
from megatron.core import parallel_state
from transformers import Qwen2Config

from megatron_flowrl.checkpoint import convert
from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.checkpoint.stream import BUCKET_BYTES, WeightStream
from megatron_flowrl.checkpoint.writer import CheckpointWriter
from megatron_flowrl.config import CheckpointConfig, Config, LoggingConfig, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model, wrap_for_training
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform import current_platform, distributed
from megatron_flowrl.platform.distributed import World, destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.optimizer import Optimizer

RANKS = 2
QUIET = LoggingConfig(level="warning", progress=False)
BF16 = PrecisionConfig(dtype="bfloat16")
TP2 = ParallelConfig(tensor_model_parallel_size=RANKS)


def architecture_of(layers: int, hidden: int, vocab: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(2, hidden // 256),
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )


class PeakMemory:
    """Largest anonymous memory of this process while the block runs, above that at its beginning, in bytes."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is not to be used again unseen
        self._before, self._done = anonymous_memory(), threading.Event()
        self.peak = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous_memory() - self._before)


def anonymous_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def measured(action: Callable[[], object]) -> dict[str, float]:
    """Seconds and peak memory of the rank that needs most."""
    dist.barrier()
    started = time.perf_counter()
    with PeakMemory() as memory:
        action()
    seconds = time.perf_counter() - started
    everywhere: list[tuple[float, int]] = [(0.0, 0)] * dist.get_world_size()
    dist.all_gather_object(everywhere, (seconds, memory.peak))
    return {"seconds": round(max(s for s, _ in everywhere), 3), "peak_bytes": max(p for _, p in everywhere)}


def conversions(folder: Path, world: World, bucket_bytes: int) -> dict[str, object]:
    """Random weights -> checkpoint -> Hugging Face -> checkpoint, and the stream alone; all under TP2."""
    random = Config(
        model=ModelConfig(path=str(folder / "bare"), init="random"), parallel=TP2, precision=BF16, logging=QUIET
    )
    convert.hugging_face_to_megatron(random, world, folder / "start", dtype_given=True)
    export = Config(model=ModelConfig(path=str(folder / "start")), parallel=TP2, precision=BF16, logging=QUIET)

    def hf(config: Config, out: Path) -> None:
        convert.megatron_to_hugging_face(
            config, world, out, dtype=None, max_shard_bytes=10**9, bucket_bytes=bucket_bytes
        )

    exported = measured(lambda: hf(export, folder / "hf"))
    back = replace(export, model=ModelConfig(path=str(folder / "hf")))
    imported = measured(lambda: convert.hugging_face_to_megatron(back, world, folder / "again", dtype_given=True))

    platform, architecture = current_platform(), read_architecture(folder / "hf")
    initialize_process_groups(world, TP2, platform, 0)
    model = build_parallel_model(architecture, back, platform)
    load_weights(model, open_source(back, architecture))
    share = sum(p.nbytes for module in model.modules for p in module.parameters())
    stream = WeightStream(model, bucket_bytes=bucket_bytes)
    total = sum(info.nbytes for info in stream.metadata())

    def drain() -> None:
        for _ in stream:
            pass

    drain()
    streamed = measured(drain)
    source, target = torch.ones(total, dtype=torch.uint8), torch.empty(total, dtype=torch.uint8)
    target.copy_(source)
    copied = measured(lambda: target.copy_(source))
    parallel_state.destroy_model_parallel()
    largest = max(info.nbytes for info in stream.metadata())
    return {
        "parameters": total // 2,
        "bytes": total,
        "share_bytes": share,
        "bucket_bytes": bucket_bytes,
        "largest_tensor_bytes": largest,
        "export": exported,
        "import": imported,
        "stream": streamed,
        "memory_copy_seconds": copied["seconds"],
    }


def saves(folder: Path, world: World) -> dict[str, object]:
    """Training states of `folder/small`, data-parallel: seconds until `save` returns, and until the disk has it."""
    platform, architecture = current_platform(), read_architecture(folder / "small")
    result: dict[str, object] = {}
    for name, asynchronous in (("asynchronous", True), ("synchronous", False)):
        config = Config(
            model=ModelConfig(path=str(folder / "small"), init="random"),
            precision=BF16,
            checkpoint=CheckpointConfig(save=str(folder / name), async_save=asynchronous, keep_last=1),
            logging=QUIET,
        )
        initialize_process_groups(world, ParallelConfig(), platform, 0)
        model = build_parallel_model(architecture, config, platform)
        load_weights(model, open_source(config, architecture))
        model = wrap_for_training(model, config)
        optimizer = Optimizer(model, config)
        writer = CheckpointWriter(folder / name, config, folder / "small")
        state = TrainingState(model, optimizer.megatron)
        blocked, on_disk = [], []
        for step in (1, 2, 3):
            optimizer.zero_grad()
            optimizer.step()
            started = time.perf_counter()
            writer.save(state, step, {})
            blocked.append(round(time.perf_counter() - started, 3))
            writer.wait()
            on_disk.append(round(time.perf_counter() - started, 3))
        assert writer.last_saved == 3
        size = sum(f.stat().st_size for f in (folder / name / "step_00000003").rglob("*"))
        result[name] = {"bytes": size, "blocked_seconds": blocked, "on_disk_seconds": on_disk}
        parallel_state.destroy_model_parallel()
    return result


def worker(folder: Path, bucket_bytes: int) -> None:
    distributed.destroy_process_groups = parallel_state.destroy_model_parallel  # one group of all ranks for everything
    world, platform = read_world(), current_platform(read_world().local_rank)
    configure_logging(QUIET, world.rank)
    initialize_process_groups(world, ParallelConfig(), platform, 0)
    parallel_state.destroy_model_parallel()
    result = {"conversions": conversions(folder, world, bucket_bytes), "saves": saves(folder, world)}
    if world.rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    destroy_process_groups()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=64000)
    parser.add_argument("--bucket-bytes", type=int, default=BUCKET_BYTES)
    parser.add_argument("--small-layers", type=int, default=12, help="layers of the model whose training is saved")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.bucket_bytes)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for which, layers, vocab in (
            ("bare", given.layers, given.vocab),
            ("small", given.small_layers, given.vocab // 4),
        ):
            (folder / which).mkdir()
            architecture_of(layers, given.hidden, vocab).save_pretrained(folder / which)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS),
            __file__, "--worker", name, "--bucket-bytes", str(given.bucket_bytes),
        ]  # fmt: skip
        # A fixed threshold: glibc's own grows, and then it keeps up to 64 MB that were given back to it.
        settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **settings})
        result = json.loads((folder / "result.json").read_text())
    print_table(result)
    print(json.dumps(circumstances(("torch", "megatron-core", "safetensors")) | result, indent=2))


def print_table(result: dict[str, dict]) -> None:
    c, mega = result["conversions"], 2**20
    print(
        f"{c['parameters'] / 1e6:.0f} M parameters, {c['bytes'] / mega:.0f} MiB, TP{RANKS}: share of a rank "
        f"{c['share_bytes'] / mega:.0f} MiB, bucket {c['bucket_bytes'] / mega:.0f} MiB, "
        f"largest tensor {c['largest_tensor_bytes'] / mega:.0f} MiB",
        file=sys.stderr,
    )
    for what in ("import", "export", "stream"):
        m = c[what]
        rate = c["bytes"] / m["seconds"] / 1e9
        print(
            f"{what:<8} {m['seconds']:>7.2f} s {rate:>6.2f} GB/s   peak {m['peak_bytes'] / mega:>6.0f} MiB",
            file=sys.stderr,
        )
    print(f"copy     {c['memory_copy_seconds']:>7.2f} s", file=sys.stderr)
    for name, save in result["saves"].items():
        print(
            f"save, {name:<13} {save['bytes'] / 1e9:.2f} GB: training waits {min(save['blocked_seconds']):.2f} s, "
            f"on disk after {min(save['on_disk_seconds']):.2f} s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
