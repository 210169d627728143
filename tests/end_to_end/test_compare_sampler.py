"""In fp32, vLLM with the trainer's weights says what the trainer says of every token it has sampled, to 1e-4.

Through the command, whose servers start without weights: under tensor parallelism from a Hugging Face folder, and from
a checkpoint of this program, which has none in Hugging Face's form.
"""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_module, run_worker
from tests.end_to_end.test_export_in_vllm import processes_with
from tests.tiny_models import save_model_for_vllm

# A server takes half a minute to start, and several times that on a machine that others use.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

COUNT, MAX_TOKENS = 64, 48
TOLERANCE = 1e-4
STOP = [5, 17, 100]
SERVERS = [
    "precision.dtype=float32", "rollout.dtype=float32", "rollout.max_model_len=256", "rollout.cpu_kv_cache_gib=1",
    'rollout.extra_arguments=["--enforce-eager"]', f"generation.max_tokens={MAX_TOKENS}",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_for_vllm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 200, (COUNT,), generator=generator).tolist()
    return [torch.randint(299, (length,), generator=generator).tolist() for length in lengths]


def compare(
    model: Path, prompts: list[list[int]], folder: Path, ranks: int, *settings: str
) -> tuple[list[dict[str, Any]], str]:
    """What `score --compare-sampler` writes, and what it prints."""
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    files = ["--model", str(model), "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    arguments = ["score", "--compare-sampler", *files, "--server-logs", str(folder / "logs"), *SERVERS, *settings]
    done = run_module("megatron_flowrl", arguments, ranks, timeout=800.0)
    assert done.returncode == 0, done.stdout[-6000:]
    print(done.stdout)
    assert "dummy" in (folder / "logs" / "server_0.log").read_text(), "the server was meant to start without weights"
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], done.stdout


def check_lines(records: list[dict[str, Any]], prompts: list[list[int]], n: int) -> None:
    """Every prompt's answers in order, one version of the weights, and both programs of one mind."""
    assert [record["prompt"] for record in records] == [prompt for prompt in prompts for _ in range(n)]
    differences = []
    for record in records:
        length = len(record["response"])
        assert len(record["log_probs"]) == len(record["sampler_log_probs"]) == length > 0
        assert record["weight_versions"] == [{"version": "0", "start": 0, "stop": length}]
        pairs = zip(record["log_probs"], record["sampler_log_probs"], strict=True)
        differences += [abs(ours - theirs) for ours, theirs in pairs]
    assert max(differences) <= TOLERANCE
    assert min(min(record["log_probs"]) for record in records) < -5, "unlikely tokens are among them"


def check_report(printed: str, tokens: int, answers: int) -> None:
    assert f"mismatch over {tokens} tokens of {answers} answers" in printed
    largest = re.search(r"log-probs: mean \S+, max (\S+)", printed)
    assert largest is not None and float(largest[1]) <= TOLERANCE
    assert "worst token: prompt " in printed


def test_under_tensor_parallelism(model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """At T = 1; the model has no EOS, and every answer is as long as it may be."""
    settings = ["parallel.tensor_model_parallel_size=2", "generation.n=1", "log_prob.temperature=1.0"]
    records, printed = compare(model, prompts, tmp_path, 2, *settings)
    assert all(len(record["response"]) == MAX_TOKENS for record in records)
    assert {record["finish_reason"] for record in records} == {"length"}
    check_lines(records, prompts, 1)
    check_report(printed, COUNT * MAX_TOKENS, COUNT)
    assert processes_with(str(model)) == [], "the server has ended"


def test_from_a_checkpoint_with_stop_tokens(model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """At T = 0.6, two answers to each prompt, which end with a stop token of generation_config.json."""
    source = shutil.copytree(model, tmp_path / "source")
    path = source / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": STOP}))
    run_worker("megatron_flowrl", ["convert", "hf-to-megatron", str(source), str(tmp_path / "run")], 1)
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    records, printed = compare(
        tmp_path / "run", prompts, tmp_path, 1, "generation.n=2", "log_prob.temperature=0.6"
    )  # fmt: skip
    check_lines(records, prompts, 2)
    check_report(printed, sum(len(record["response"]) for record in records), 2 * COUNT)
    for record in records:
        *before, last = record["response"]
        assert not set(before) & set(STOP)
        assert record["finish_reason"] == ("stop" if last in STOP else "length")
        assert last in STOP or len(record["response"]) == MAX_TOKENS
    assert {record["finish_reason"] for record in records} == {"stop", "length"}
    pairs = pairwise(record["response"] for record in records)
    assert any(one != other for one, other in list(pairs)[::2]), "a prompt's answers are drawn, not copied"
