"""One GPU's worth of runs, made once, beside the same runs on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from tests.conftest import VISIBLE_GPUS
from tests.distributed.ranks import REPOSITORY
from tests.tiny_models import VOCABULARY, random_sequences
from tests.tiny_tasks import EOS, save_tokenizer, write_rows
from tests.training.recorded import arguments, write_records

GPU = Path("/dev/nvidia0")
STEPS = 4
RESUMED = ("bfloat16", "hybrid_delayed", "hybrid_blockwise", "param_gather")
_SIZES: dict[str, Any] = {  # multiples of what FP8 wants, and of its blocks of 128
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
MODELS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_SIZES, head_dim=64, tie_word_embeddings=True),
    "llama": LlamaConfig(**_SIZES),
}
BF16 = ["precision.dtype=bfloat16"]
FP8 = {
    f"{form}_{recipe}": [*BF16, f"precision.fp8={form}", f"precision.fp8_recipe={recipe}"]
    for form in ("hybrid", "e4m3")
    for recipe in ("delayed", "tensorwise", "blockwise")
} | {
    "first_last_bf16": [
        *BF16,
        "precision.fp8=hybrid",
        "precision.fp8_recipe=tensorwise",
        "precision.first_last_layers_bf16=true",
    ],
    "param_gather": [
        *BF16,
        "precision.fp8=hybrid",
        "precision.fp8_recipe=tensorwise",
        "precision.fp8_param_gather=true",
    ],
}

EMULATED = [name for name, settings in FP8.items() if "precision.fp8_param_gather=true" not in settings]


@dataclass(frozen=True)
class Made:
    """Folder of all runs, and how each ended."""

    folder: Path
    outcomes: dict[str, dict[str, Any]]

    def scores(self, name: str) -> torch.Tensor:
        """fp64 [all response tokens]."""
        self.check(name)
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        return torch.tensor([value for line in lines for value in json.loads(line)["log_probs"]], dtype=torch.float64)

    def metrics(self, name: str) -> list[dict[str, float]]:
        """Of a run's steps."""
        self.check(name)
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def check(self, name: str) -> None:
        """It ended well."""
        assert self.outcomes[name]["status"] == 0, self.outcomes[name]["said"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All commands, on the GPU and on the CPU."""
    if not GPU.exists():
        pytest.skip(f"there is no GPU: {GPU} is missing")
    folder = tmp_path_factory.mktemp("gpu")
    for name, config in MODELS.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    lines = [{"prompt": [*s.prompt], "response": [*s.response]} for s in random_sequences(64, longest=100)]
    write_rows(folder / "input.jsonl", lines)
    write_rows(folder / "train.jsonl", [{"prompt": f"w{2 + i} w{9 + i}", "ground_truth": 150} for i in range(24)])
    (folder / "model").symlink_to(folder / "qwen2")
    write_records(folder, folder / "records", STEPS)
    on_gpu, on_cpu = gpu_jobs(folder), cpu_jobs(folder)
    outcomes = run_jobs(folder, {"gpu": on_gpu, "cpu": on_cpu})
    return Made(folder, outcomes)


def gpu_jobs(folder: Path) -> dict[str, list[str]]:
    """Scores of every family in fp32 and bf16, and in FP8 of the first; runs in every precision, one in two parts."""
    jobs = {}
    for name in MODELS:
        jobs[f"score_{name}_float32"] = score(folder, name, f"score_{name}_float32", ["precision.dtype=float32"])
        jobs[f"score_{name}_bfloat16"] = score(folder, name, f"score_{name}_bfloat16", BF16)
    for recipe, settings in FP8.items():
        jobs[f"score_{recipe}"] = score(folder, "qwen2", f"score_{recipe}", settings)
    for name, settings in {"float32": ["precision.dtype=float32"], "bfloat16": BF16, **FP8}.items():
        jobs[f"train_{name}"] = train(folder, f"train_{name}", settings)
    for name in RESUMED:
        settings = BF16 if name == "bfloat16" else FP8[name]
        jobs[f"half_{name}"] = train(folder, f"resumed_{name}", [*settings, "run.steps=2"])
        jobs[f"resumed_{name}"] = train(folder, f"resumed_{name}", settings)
    return jobs


def cpu_jobs(folder: Path) -> dict[str, list[str]]:
    """What the GPU's are compared with."""
    fp32 = ["precision.dtype=float32"]
    jobs = {f"cpu_{name}": score(folder, name, f"cpu_{name}", fp32) for name in MODELS}
    jobs |= {f"cpu_{name}_bfloat16": score(folder, name, f"cpu_{name}_bfloat16", BF16) for name in MODELS}
    jobs |= {f"cpu_{name}": score(folder, "qwen2", f"cpu_{name}", FP8[name]) for name in EMULATED}
    jobs["cpu_train"] = train(folder, "cpu_train", fp32)
    return jobs


def score(folder: Path, model: str, name: str, settings: list[str]) -> list[str]:
    """Of `megatron-flowrl score`."""
    files = ["--input", str(folder / "input.jsonl"), "--output", str(folder / f"{name}.jsonl")]
    return ["score", *files, f"model.path={folder / model}", "data.tokens_per_micro_batch=512", *settings]


def train(folder: Path, name: str, settings: list[str]) -> list[str]:
    """Of `megatron-flowrl train`."""
    given = arguments(
        folder, folder / "records", folder / name, run__steps=STEPS, objective__preset="exact", optimizer__lr=1e-4
    )
    names = {setting.partition("=")[0] for setting in settings}
    return [one for one in given if one.partition("=")[0] not in names] + settings


def run_jobs(folder: Path, jobs: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, Any]]:
    """Both at once."""
    processes, outcomes = {}, {}
    for where, of_place in jobs.items():
        given = folder / f"{where}_jobs.json"
        given.write_text(json.dumps(of_place))
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        if where == "gpu":
            del environment["CUDA_VISIBLE_DEVICES"]
            if VISIBLE_GPUS is not None:
                environment["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
        command = [sys.executable, "-m", "tests.gpu.worker", str(given), str(folder / f"{where}_out.json")]
        processes[where] = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    for where, process in processes.items():
        process.wait(500)
        assert process.returncode == 0, where
        outcomes |= json.loads((folder / f"{where}_out.json").read_text())
    return outcomes


__all__ = ["EMULATED", "FP8", "GPU", "MODELS", "RESUMED", "STEPS", "Made"]
