"""Records of rollouts without a sampler, and runs on them as a user starts them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.tokenizer import load_tokenizer
from megatron_flowrl.rollout.generation import VersionSpan
from megatron_flowrl.rollout.record import RecordFolder, RolloutRecord
from tests.distributed.ranks import REPOSITORY
from tests.tiny_models import VOCABULARY
from tests.tiny_tasks import EOS, SETTINGS

PROMPTS, ANSWERS = 4, 4


def write_records(task: Path, folder: Path, steps: int) -> Path:
    """Ragged answers to the task's prompts, with rewards of 0, 1 and between; some are EOS alone."""
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    encode = load_tokenizer(task / "model").encode
    draw = random.Random(2)
    for step in range(1, steps + 1):
        numbers = [(PROMPTS * (step - 1) + place) % len(rows) for place in range(PROMPTS)]
        responses = [
            (*draw.choices(range(2, VOCABULARY), k=draw.randint(0, 20)), EOS) for _ in range(PROMPTS * ANSWERS)
        ]
        tokens = sum(map(len, responses))
        record = RolloutRecord(
            step=step,
            position=PROMPTS * (step - 1),
            source="drawn",
            prompt_numbers=tuple(number for number in numbers for _ in range(ANSWERS)),
            sequences=tuple(
                TokenSequence(tuple(encode(rows[numbers[place // ANSWERS]]["prompt"], True)), response)
                for place, response in enumerate(responses)
            ),
            groups=tuple(place // ANSWERS for place in range(len(responses))),
            rewards=tuple(draw.choice((0.0, 0.0, 0.5, 1.0)) for _ in responses),
            log_probs=torch.tensor([draw.uniform(-7, -3) for _ in range(tokens)]),
            finish_reasons=("stop",) * len(responses),
            keys=tuple(str(response[0]) for response in responses),
            problems=(None,) * len(responses),
            weight_versions=tuple((VersionSpan(str(step - 1), 0, len(response)),) for response in responses),
            seconds={},
        )
        RecordFolder(folder).write(step, record.encode())
    return folder


def arguments(task: Path, records: Path, run: Path, **settings: Any) -> list[str]:
    """Of `megatron-flowrl`, to train on records. In the names of `settings`, `__` stands for a dot."""
    given = SETTINGS | {
        "model.path": task / "model",
        "rollout.replay": records,
        "run.folder": run,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    texts = {name: json.dumps(value) if isinstance(value, list | bool) else value for name, value in given.items()}
    return ["train", *(f"{name}={value}" for name, value in texts.items())]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def start_run(given: Sequence[str], ranks: int, *launcher: str) -> subprocess.Popen[str]:
    """`megatron-flowrl` with these arguments on so many ranks, in a session of its own; its output can be read."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        *launcher,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [*torchrun, "-m", "megatron_flowrl", *given],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
