"""Two steps of `megatron-flowrl train` on drawn answers: one, and after a start anew from its checkpoint another."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_flowrl.config import Config, UserError, load_config, to_yaml
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.dry_run.ranks import RanksFailed, run_ranks
from megatron_flowrl.dry_run.small import (
    ANSWER_TOKENS,
    EOS,
    PROMPT_TOKENS,
    VOCABULARY,
    SmallRun,
    write_model,
)
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform.distributed import read_world
from megatron_flowrl.rollout.generation import VersionSpan
from megatron_flowrl.rollout.record import RecordFolder, RolloutRecord
from megatron_flowrl.training.loop import train

_ONE, _ZERO = ("first_weight_mean", "first_weight_max", "first_ratio"), ("first_kl_old",)


class DryRunFailed(UserError):
    """The small run did not do what it has to."""


def train_small(run: SmallRun, timeout: float) -> list[dict[str, Any]]:
    """Both steps' metrics. Raises DryRunFailed, with the end of the output, where something is not as it has to be."""
    config = run.config
    write_model(run)
    for step in range(1, config.run.steps + 1):
        record = drawn_record(config, step)
        RecordFolder(Path(str(config.rollout.replay))).write(step, record.encode())
    recipe = Path(config.run.folder).with_name("recipe.yaml")
    recipe.write_text(to_yaml(config))
    for step in range(1, config.run.steps + 1):
        try:
            said = run_ranks(partial(_start, recipe, step), run.ranks, recipe.with_name(f"start_{step}"), timeout)
        except RanksFailed as error:
            raise DryRunFailed(f"the small run on {run.ranks} ranks, start {step}: {error}") from error
        if f"; steps {step} to {step}" not in said:
            raise DryRunFailed(f"start {step} did not go on from the checkpoint of step {step - 1}:\n{said}")
    metrics = [json.loads(line) for line in Path(config.run.folder, "metrics.jsonl").read_text().splitlines()]
    check_metrics(metrics, exact=is_exact(config))
    return metrics


def is_exact(config: Config) -> bool:
    """Whether the same weights give the same log-probs each time: not with scales of the passes before."""
    return config.precision.fp8 is None or config.precision.fp8_recipe != "delayed"


def _start(recipe: Path, steps: int) -> None:
    """As `megatron-flowrl train recipe run.steps=steps` on one rank."""
    config, world = load_config(recipe, [f"run.steps={steps}"]), read_world()
    configure_logging(config.logging, world.rank)
    train(config, world)


def drawn_record(config: Config, step: int) -> RolloutRecord:
    """Answers of all lengths, with rewards of 0 and 1; drawn from `step` alone."""
    draw, answers, prompts = random.Random(step), config.generation.n, config.run.prompts_per_step

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(2, VOCABULARY), k=draw.randint(1, most)))

    asked = [tokens(PROMPT_TOKENS) for _ in range(prompts)]
    groups = [place // answers for place in range(prompts * answers)]
    sequences = tuple(TokenSequence(asked[group], (*tokens(ANSWER_TOKENS - 1), EOS)) for group in groups)
    lengths = [len(sequence.response) for sequence in sequences]
    return RolloutRecord(
        step=step,
        position=prompts * (step - 1),
        source="drawn",
        prompt_numbers=tuple(groups),
        sequences=sequences,
        groups=tuple(groups),
        rewards=tuple(float(draw.random() < 0.5) for _ in groups),
        log_probs=torch.tensor([draw.uniform(-7, -5) for _ in range(sum(lengths))]),
        finish_reasons=("stop",) * len(groups),
        keys=(None,) * len(groups),
        problems=(None,) * len(groups),
        weight_versions=tuple((VersionSpan(str(step - 1), 0, length),) for length in lengths),
        seconds={},
    )


def check_metrics(metrics: Sequence[Mapping[str, Any]], *, exact: bool = True) -> None:
    """Both steps are there, finite and updated; if `exact`, on-policy exactly, and at the reference in the first.

    Raises DryRunFailed with all that is not so.
    """
    problems = []
    if [line["step"] for line in metrics] != [1, 2]:
        problems.append(f"metrics.jsonl has the steps {[line['step'] for line in metrics]}")
    for line in metrics:
        wanted = {"skipped_updates": 0.0}
        if exact:
            wanted |= dict.fromkeys(_ONE, 1.0) | dict.fromkeys(_ZERO, 0.0)
        if exact and line["step"] == 1:
            wanted["first_kl_reference"] = 0.0
        for name, value in wanted.items():
            if line.get(f"update/{name}", value) != value:
                problems.append(f"step {line['step']}: update/{name} is {line[f'update/{name}']}, and not {value}")
        for name in ("update/loss", "update/grad_norm"):
            if not math.isfinite(line[name]):
                problems.append(f"step {line['step']}: {name} is {line[name]}")
    if problems:
        raise DryRunFailed(*problems)


__all__ = ["DryRunFailed", "check_metrics", "drawn_record", "is_exact", "train_small"]
