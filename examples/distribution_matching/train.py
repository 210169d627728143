"""One method on one task: sample, reward, update; and now and then measure how far the policy is from the target."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from examples.distribution_matching.methods import METHODS, Outcome, Schedule, settings_of
from examples.distribution_matching.model import (
    answer_log_probs,
    learned_log_z,
    make_config,
    sample,
    write_architecture,
)
from examples.distribution_matching.tasks import Task, distance
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.objective import build_objective
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import World, process_groups
from megatron_flowrl.training.experience import gather_experience
from megatron_flowrl.training.trainer import Trainer

MEASUREMENTS = 30  # over a run, for the course of the KL divergence


class Run:
    """The policy and all that trains it."""

    def __init__(self, task: Task, name: str, schedule: Schedule, config: Config, seed: int) -> None:
        self.task, self.schedule, self.config, self.skipped_updates = task, schedule, config, 0
        platform = current_platform()
        architecture = read_architecture(config.model.path)
        source = open_source(config, architecture)
        self.trainer = Trainer(architecture, source, build_objective(config), config, platform, data_parallel_size=1)
        self.model = self.trainer.model
        self._generator = torch.Generator().manual_seed(seed)
        log_target = task.log_target
        self._rewards = log_target if METHODS[name].reward == "log_target" else log_target.exp()

    def step(self, number: int) -> None:
        """Sample answers, reward them, update once for each mini-batch."""
        task, count, parts = self.task, self.schedule.samples, self.schedule.mini_batches
        sequences = sample(self.model, task, count, self._generator)
        prompts = [index // count for index in range(len(sequences))]
        columns = [task.column[sequence.response] for sequence in sequences]
        rewards = self._rewards[prompts, columns].tolist()
        experience = gather_experience(sequences, rewards, prompts, self.config)
        # Every mini-batch has its share of each prompt's answers.
        trained = self.trainer.step(number, experience, [index % parts for index in range(len(sequences))])
        self.skipped_updates += int(trained.metrics["update/skipped_updates"])

    def log_z_error(self) -> float | None:
        """Mean over prompts of |learned log Z - truth|; None where nothing learns it."""
        if not self.model.log_z:
            return None
        return float((learned_log_z(self.model, self.task, self.config) - self.task.log_partition).abs().mean())


def train(
    task: Task, name: str, schedule: Schedule, seed: int, advance: Callable[[], object] = lambda: None
) -> Outcome:
    """Train by the method `name`; `advance` is called after each step."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_architecture(task, Path(folder))
        config = make_config(Path(folder), settings_of(name, schedule, seed))
        with process_groups(World(), config.parallel, current_platform(), config.seed):
            run = Run(task, name, schedule, config, seed)
            course = []
            log_probs = answer_log_probs(run.model, task)
            for step in range(schedule.steps + 1):
                if step:
                    run.step(step)
                    advance()
                if step % max(1, schedule.steps // MEASUREMENTS) == 0 or step == schedule.steps:
                    log_probs = answer_log_probs(run.model, task)
                    course.append((step, distance(task, log_probs).kl_target_policy))
            figures = {**asdict(distance(task, log_probs)), "log_z_error": run.log_z_error()}
            skipped = run.skipped_updates
    return Outcome(figures, course, log_probs.exp(), skipped, time.perf_counter() - started)
