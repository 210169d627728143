"""A recipe tried on a CPU before it waits in a queue: its layout at the true size, and two steps with a small model.

  python -m megatron_flowrl.dry_run RECIPE [--gpus 32] [section.key=value ...]

1. Settings, model and number of GPUs are checked as `train` checks them; `megatron-flowrl plan` asks the same.
2. A step of the lengths that `plan` foresees is packed at the true token budget. Every rank of the true layout is
   looked at, without weights: which part of each parameter it holds, in the Hugging Face checkpoint and in the run's.
3. `train` runs two steps on at most eight ranks of this machine, with a model of the same layers and heads but small
   widths, on drawn answers: a start, a checkpoint, and a start that goes on from it.

Exit status 2: the recipe is at fault, and the setting is named; 1: the program is.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_flowrl.cli import TRAIN_SECTIONS
from megatron_flowrl.config import Config, UserError, load_config
from megatron_flowrl.dry_run.layout import LayoutError, check_ranks
from megatron_flowrl.dry_run.small import SmallRun, on_a_cpu, small_run
from megatron_flowrl.dry_run.step import pack_step
from megatron_flowrl.dry_run.training import DryRunFailed, is_exact, train_small
from megatron_flowrl.planning.refusals import Cluster, check_run
from megatron_flowrl.planning.workload import assumed

_NOT_EXERCISED = (
    "not exercised: memory, speed, NCCL, Transformer Engine's kernels, vLLM, prompts, graders; nothing of this is a "
    "result on GPUs"
)


def dry_run(config: Config, cluster: Cluster, *, small: bool, timeout: float) -> None:
    """All of it, said line by line. Raises UserError."""
    workload = assumed(config, None, None)
    accepted = check_run(config, cluster, workload)
    architecture, replicas, parallel = accepted.shapes.architecture, accepted.replicas, config.parallel
    gpus = accepted.sizes.training * accepted.sizes.per_node
    chunks = parallel.virtual_pipeline_model_parallel_size
    _say(
        f"{config.model.path}: {architecture.num_layers} layers of width {architecture.hidden_size}; {gpus} ranks = "
        f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
        f"{f' (VPP{chunks})' if chunks else ''} x CP{parallel.context_parallel_size} x DP{replicas}"
    )
    for note in accepted.notes:
        _say(f"note: {note}")
    packed = pack_step(config, architecture, replicas, workload)
    _say(packed.packing.describe())
    if packed.stages > 1:
        _say(f"schedule: stages wait {packed.idle_share:.1%} of an update for one another, micro-batches being equal")
    began = time.monotonic()
    parts = check_ranks(on_a_cpu(config)[0], architecture, gpus, log_z=accepted.needs.log_z)
    _say(
        f"layout: {len(parts.pieces)} tensors, each held once in {len(parts.parameters)} parts of "
        f"{min(parts.parameters) / 1e9:.2f} to {max(parts.parameters) / 1e9:.2f} billion parameters; the run's "
        f"checkpoint is {len(parts.shapes)} whole tensors ({time.monotonic() - began:.0f} s)"
    )
    if small:
        with tempfile.TemporaryDirectory(prefix="dry_run_") as folder:
            run = small_run(config, architecture, replicas, Path(folder))
            _train(run, timeout)
    _say(_NOT_EXERCISED)


def _train(run: SmallRun, timeout: float) -> None:
    began, model, precision = time.monotonic(), run.model, run.config.precision
    emulated = f", {precision.fp8_recipe} FP8 emulated" if precision.fp8 else ""
    metrics = train_small(run, timeout)
    _say(
        f"train: 2 steps of {int(metrics[0]['update/updates'])} updates on {run.ranks} ranks, "
        f"{model['num_hidden_layers']} layers of width {model['hidden_size']}, {model['num_attention_heads']} heads in "
        f"{model['num_key_value_heads']} groups{emulated}, the second after a start from the checkpoint of the "
        f"first; losses {', '.join(format(line['update/loss'], '.4g') for line in metrics)} "
        f"({time.monotonic() - began:.0f} s)"
    )
    first = {name.removeprefix("update/"): value for name, value in metrics[0].items() if "/first_" in name}
    how = "as it has to be" if is_exact(run.config) else "as nearly as delayed FP8 scales have it"
    _say(f"on-policy, {how}: {', '.join(f'{name} {value:g}' for name, value in first.items())}")
    for note in run.notes:
        _say(note)


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with status 2 where the recipe is at fault, and 1 where the program is."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_flowrl.dry_run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, help="ranks of the run (default: as few nodes as the layout takes)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--sampler-nodes", type=int, metavar="N", help="that serve vLLM and do not train (default: one, if any)"
    )
    parser.add_argument("--layout-only", action="store_true", help="without the steps on a small model")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a start of these (default: 600)")
    given = parser.parse_intermixed_args(arguments)
    try:
        for option, count in (("--gpus", given.gpus), ("--gpus-per-node", given.gpus_per_node)):
            if count is not None and count < 1:
                raise UserError(f"{option} {count}: one at least")
        config = load_config(given.recipe, given.overrides, TRAIN_SECTIONS, "train")
        cluster = Cluster(given.gpus, given.gpus_per_node, given.sampler_nodes)
        dry_run(config, cluster, small=not given.layout_only, timeout=given.timeout)
    except UserError as error:
        print(f"dry run: error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, DryRunFailed | LayoutError) else 2)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a CPU wherever it is: a login node, a laptop, a node with GPUs
    main()
