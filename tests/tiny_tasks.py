"""A task for tests of whole runs: a random model with a tokenizer of words, prompts, responses, and a grader."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from megatron_flowrl.rewards.grader import Grade, Item
from tests.tiny_models import VOCABULARY, save_model_for_vllm

EOS = 1
WORDS = ["<pad>", "<eos>", *(f"w{number}" for number in range(2, VOCABULARY))]


def save_task(folder: Path, *, prompts: int = 24, seed: int = 3) -> Path:
    """Write model/, train.jsonl, test.jsonl and sft.jsonl to `folder`."""
    model = save_model_for_vllm(folder / "model", seed=seed)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text()) | {"eos_token_id": EOS, "bos_token_id": None}
        (model / name).write_text(json.dumps(settings))
    save_tokenizer(model)
    draw = random.Random(5)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS[2:], k=count))

    rows = [
        {"prompt": words(draw.randint(1, 6)), "ground_truth": 150, "num_solutions": 3}
        for _ in range(prompts + prompts // 2)
    ]
    write_rows(folder / "train.jsonl", rows[:prompts])
    write_rows(folder / "test.jsonl", rows[prompts:])
    responses = [{"prompt": words(draw.randint(1, 6)), "response": words(draw.randint(1, 8))} for _ in range(64)]
    write_rows(folder / "sft.jsonl", responses)
    return folder


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """A tokenizer of words."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """JSONL."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def grade(items: Sequence[Item]) -> list[Grade]:
    """The share of an answer's words whose number is below the ground truth; the key is the first word."""
    grades = []
    for item in items:
        words = item.response.split()
        low = [int(word[1:]) < item.ground_truth for word in words if word[1:].isdigit()]
        grades.append(Grade(sum(low) / len(low) if low else 0.0, words[0] if words else None))
    return grades


GRADER = "tests.tiny_tasks.grade"
SETTINGS: dict[str, Any] = {
    "precision.dtype": "float32",
    "reward.grader": GRADER,
    "reward.workers": 1,
    "reward.correct_from": 0.5,
    "run.prompts_per_step": 4,
    "run.prompts_per_mini_batch": 2,
    "run.steps": 3,
    "prompts.max_tokens": 16,
    "generation.n": 4,
    "generation.max_tokens": 24,
    "data.tokens_per_micro_batch": 96,
    "optimizer.lr": 1e-3,
    "rollout.dtype": "float32",
    "rollout.max_model_len": 64,
    "rollout.cpu_kv_cache_gib": 1,
    "rollout.extra_arguments": ["--enforce-eager"],
    "checkpoint.save_interval": 2,
}
"""A run of three steps."""


__all__ = ["EOS", "GRADER", "SETTINGS", "WORDS", "grade", "save_task", "save_tokenizer", "write_rows"]
