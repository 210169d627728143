"""Supervised training: its first loss is transformers', it learns, and reinforcement learning goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_flowrl.data.tokenizer import load_tokenizer
from tests.distributed.ranks import run_module
from tests.tiny_tasks import EOS, save_task, write_rows
from tests.training.recorded import arguments, metrics_of, write_records

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

ROWS = [
    {"prompt": f"w{a} w{b}", "response": f"w{b} w{a} w{(a + b) % 9 + 2}"} for a in range(2, 10) for b in range(2, 10)
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data."""
    folder = save_task(tmp_path_factory.mktemp("task"))
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def tuned(task: Path, run: Path, ranks: int, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run on all rows in every step."""
    settings: dict[str, Any] = {
        "precision.dtype": "float32",
        "model.path": task / "model",
        "sft.path": task / "rows.jsonl",
        "sft.sequences_per_step": len(ROWS),
        "sft.validation_share": 0,
        "run.folder": run,
        "run.steps": steps,
        "optimizer.lr": 3e-3,
        "checkpoint.save_interval": 10,
        "data.tokens_per_micro_batch": 128,
    }
    done = run_module("megatron_flowrl", ["sft", *(f"{name}={value}" for name, value in settings.items())], ranks)
    assert done.returncode == 0, done.stdout[-4000:]
    return metrics_of(run)


def test_it_learns_and_training_goes_on(task: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(task / "model", dtype=torch.float32)
    encode = load_tokenizer(task / "model").encode
    log_probs = []
    for row in ROWS:
        prompt, response = encode(row["prompt"], True), [*encode(row["response"], False), EOS]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_probs.append(logits.log_softmax(-1)[torch.arange(len(response)), response])
    found = tuned(task, tmp_path / "start", 2, 20)
    assert found[0]["update/loss"] == pytest.approx(-float(torch.cat(log_probs).mean()), rel=1e-5)
    assert found[-1]["update/loss"] < 0.6 * found[0]["update/loss"]

    again = tuned(task, tmp_path / "start", 1, 30)  # goes on, on another number of ranks
    assert [line["step"] for line in again] == list(range(1, 31)) and again[:20] == found

    records = write_records(task, tmp_path / "records", 1)
    train = arguments(task, records, tmp_path / "run", run__steps=1, model__path=tmp_path / "start" / "checkpoints")
    done = run_module("megatron_flowrl", train, 1)
    assert done.returncode == 0, done.stdout[-4000:]
    (line,) = metrics_of(tmp_path / "run")
    assert line["update/first_kl_reference"] == 0.0
