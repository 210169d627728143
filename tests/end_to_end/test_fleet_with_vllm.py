"""Servers of a trainer's own, real ones: killed while they answer and while they take weights; nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.layouts import parallel
from tests.distributed.ranks import run_worker
from tests.end_to_end.test_export_in_vllm import processes_with
from tests.end_to_end.trainer import COUNT
from tests.tiny_models import save_model_for_vllm

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

_SERVER: dict[str, Any] = {
    "rollout.max_model_len": 384,
    "rollout.cpu_kv_cache_gib": 1,
    "rollout.extra_arguments": ["--enforce-eager"],
}


def expected_of(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers answers, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = [
        model.generate(torch.tensor([p]), max_new_tokens=COUNT, do_sample=False, eos_token_id=None) for p in prompts
    ]
    return [answer[0, len(p) :].tolist() for answer, p in zip(answers, prompts, strict=True)]


@pytest.mark.parametrize(
    ("case", "ranks", "settings"),
    [
        ("both_ways", 2, parallel(tp=2) | {"rollout.transfer": "disk", "rollout.tensor_parallel_size": 2}),
        ("both_ways", 2, parallel(pp=2) | {"rollout.transfer": "gloo", "rollout.tensor_parallel_size": 2}),
        (
            "killed",
            1,
            {
                "rollout.transfer": "gloo",
                "rollout.servers": 2,
                "rollout.hang_seconds": 10,
                "generation.in_flight_at_sync": "abort",
            },
        ),
    ],
)
def test_right_answers_and_nothing_left(case: str, ranks: int, settings: dict[str, Any], tmp_path: Path) -> None:
    weights = {name: save_model_for_vllm(tmp_path / name, tied=True, seed=seed) for seed, name in enumerate("AB")}
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(299, (length,), generator=generator).tolist() for length in (3, 40, 150)]
    job = {
        "case": case,
        "settings": _SERVER | settings,
        "weights": {name: str(folder) for name, folder in weights.items()},
        "prompts": prompts,
        "expected": {name: expected_of(folder, prompts) for name, folder in weights.items()},
        "logs": str(tmp_path / "logs"),
        "shared": str(tmp_path / "shared"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_worker("tests.end_to_end.fleet_worker", [str(tmp_path / "job.json")], ranks, timeout=500)
    assert processes_with(str(weights["A"])) == []
    shared = set((tmp_path / "shared").read_text().split())
    assert shared and [name for name in shared if Path(name).exists()] == []
