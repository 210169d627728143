"""Worker: training runs that save, are killed, and go on under other layouts.

torchrun ... -m tests.distributed.checkpoint_worker RUNS.json OUT.pt; the JSON is a list of `Run`s as dicts, which are
made one after the other; rank 0 saves {name: {"losses": {step: loss}, "weights_at_start", "weights", "resumed",
"last_saved"}}, weights under Hugging Face names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_flowrl.checkpoint import writer
from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.reader import resume
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.checkpoint.writer import CheckpointWriter
from megatron_flowrl.config import Config, check_config, data_parallel_size, load_config
from megatron_flowrl.data.batch import PackedBatch
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model, wrap_for_training
from megatron_flowrl.model.gpt import TokenLogProbs
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import World, destroy_process_groups, initialize_process_groups, read_world
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import forward_backward, local_batches
from megatron_flowrl.training.reductions import sequence_sums
from megatron_flowrl.training.schedule import build_schedule
from tests.tiny_models import random_sequences

NUM_SEQUENCES = 9


@dataclass(frozen=True)
class Run:
    """A start of a training program: it goes on from `resume` if anything is there, saves, and ends after `until`."""

    name: str
    model: str
    until: int
    settings: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    save: str | None = None
    save_steps: tuple[int, ...] = ()
    hold_writers_until: int | None = None
    """Keep the writers of a save from beginning until this step is done."""
    kill_writers_at: int | None = None
    """The last rank's writers of this step's save are killed."""
    kill_at: int | None = None
    """Be killed before this step."""
    log_z: bool = False


def config_of(run: Run) -> Config:
    overrides = {
        "model.path": run.model,
        "model.make_vocab_size_divisible_by": 8,
        "precision.dtype": "float32",
        "data.tokens_per_micro_batch": 128,
        "optimizer.lr": 0.001,
        "optimizer.lr_warmup_iters": 4,
        "checkpoint.save": run.save or run.resume or "nowhere",
        "checkpoint.keep_last": 2,
    } | run.settings
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    check_config(config)
    return config


class Training:
    """A training program up to its loop: built, loaded or resumed, with somewhere to save."""

    def __init__(self, run: Run, world: World) -> None:
        self.world, self.config, self.platform = world, config_of(run), current_platform(world.local_rank)
        configure_logging(self.config.logging, world.rank)
        architecture = read_architecture(self.config.model.path)
        initialize_process_groups(world, self.config.parallel, self.platform, self.config.seed)
        model = build_parallel_model(architecture, self.config, self.platform, log_z=run.log_z)
        load_weights(model, open_source(self.config, architecture))
        model = wrap_for_training(model, self.config)
        self.optimizer = Optimizer(model, self.config)
        self.schedule = build_schedule(self.optimizer.megatron, self.config.optimizer)
        self.state = TrainingState(model, self.optimizer.megatron, self.schedule)
        self.resumed = resume(self.state, Path(run.resume), self.config) if run.resume else None
        self.writer = CheckpointWriter(Path(run.save), self.config, Path(run.model)) if run.save else None
        self.done = self.resumed.step if self.resumed else 0

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole, under Hugging Face names."""
        return {name: tensor.clone() for name, tensor in WeightStream(self.state.model)}

    def step(self) -> float:
        """One update on sequences that depend on the step alone; its loss."""
        self.done += 1
        self.schedule.step(1)
        sequences = random_sequences(NUM_SEQUENCES, seed=100 + self.done, longest=40)
        replicas = data_parallel_size(self.config.parallel, self.world.size)
        rules = packing_rules(self.config, self.state.model.architecture, replicas)
        packing = plan([len(s) for s in sequences], rules)
        batches = local_batches(sequences, packing, 0, self.platform.device)
        cp_group = parallel_state.get_context_parallel_group()

        def loss(output: TokenLogProbs, batch: PackedBatch) -> torch.Tensor:
            sums = sequence_sums(output.log_probs, batch.sequence_of_row, batch.num_sequences, cp_group)
            value = ((0.02 * sums + 1.0) ** 2).sum() / packing.num_sequences(0)
            return value + self._log_z_gradient(batch.num_sequences / packing.num_sequences(0))

        self.optimizer.zero_grad()
        value = forward_backward(self.state.model.chunks, batches, self.config.log_prob, loss)
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        assert self.optimizer.step().updated
        return value.item()

    def _log_z_gradient(self, share: float) -> torch.Tensor:
        """Zero, with a gradient for the partition function that adds up to the same under every layout."""
        last = self.state.model.modules[-1]
        if not self.state.model.log_z:
            return torch.zeros(())
        log_z = last.log_z(torch.linspace(-1, 1, last.config.hidden_size)[None]).sum()
        return share / self.config.parallel.context_parallel_size * (log_z - log_z.detach())

    def save(self) -> None:
        assert self.writer is not None
        self.writer.save(self.state, self.done, {"consumed_sequences": self.done * NUM_SEQUENCES})

    def wait(self) -> None:
        if self.writer is not None:
            self.writer.wait()


def _hold_writers(gate: Path) -> None:
    """The forked writers wait for `gate` to appear, while training goes on."""
    write_and_record = writer._write_and_record

    def held(*args: Any, **kwargs: Any) -> None:
        deadline = time.monotonic() + 60
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        write_and_record(*args, **kwargs)

    writer._write_and_record = held


@contextmanager
def _killed_writers(active: bool) -> Iterator[None]:
    write_and_record = writer._write_and_record
    if active:
        writer._write_and_record = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    yield
    writer._write_and_record = write_and_record


def make(run: Run, world: World) -> dict[str, Any]:
    training = Training(run, world)
    if training.writer is not None and -1 in run.save_steps:  # at once
        training.save()
        training.writer.wait()
    gate = Path(f"{run.save}.gate")
    if run.hold_writers_until is not None:
        _hold_writers(gate)
    weights_at_start, losses = training.weights(), {}
    while training.done < run.until:
        if training.done + 1 == run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = training.step()
        losses[training.done] = loss
        if training.writer is not None:
            training.writer.poll()
            if training.done in run.save_steps:
                with _killed_writers(run.kill_writers_at == training.done and world.rank == world.size - 1):
                    training.save()
        if training.done == run.hold_writers_until:
            assert training.writer is not None and training.writer.last_saved is None
            gate.touch()
    if training.writer is not None:
        training.writer.wait()
    result = {
        "losses": losses,
        "weights_at_start": weights_at_start,
        "weights": training.weights(),
        "lr": training.optimizer.megatron.param_groups[0]["lr"],
        "resumed": (training.resumed.step, training.resumed.progress) if training.resumed else None,
        "last_saved": training.writer.last_saved if training.writer is not None else None,
    }
    parallel_state.destroy_model_parallel()
    return result


def main() -> None:
    runs = [Run(**run) for run in json.loads(Path(sys.argv[1]).read_text())]
    world = read_world()
    results = {run.name: make(run, world) for run in runs}
    if world.rank == 0:
        torch.save(results, sys.argv[2])
    destroy_process_groups()


if __name__ == "__main__":
    main()
