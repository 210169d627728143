"""What this project exports, vLLM samples from: the same greedy tokens as transformers on the original folder."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_flowrl.config import RolloutConfig
from megatron_flowrl.rollout.guard import session_members, shared_memory_of
from megatron_flowrl.rollout.server import VllmServer
from tests.distributed.ranks import run_worker
from tests.tiny_models import save_model_for_vllm

pytestmark = pytest.mark.distributed

COUNT = 24
SETTINGS = RolloutConfig(dtype="float32", max_model_len=256, cpu_kv_cache_gib=1, extra_arguments=("--enforce-eager",))


def greedy(server: VllmServer, prompt: Sequence[int]) -> list[int]:
    """The `COUNT` most likely next tokens, one after the other."""
    body = {
        "prompt": list(prompt), "max_tokens": COUNT, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "detokenize": False,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        tokens: list[int] = json.load(reply)["choices"][0]["token_ids"]
    return tokens


def processes_with(argument: str) -> list[int]:
    """Processes with this among the arguments of their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument in path.read_bytes().decode(errors="replace").split("\0"):
                found.append(int(path.parent.name))
    return found


def test_greedy_tokens_are_those_of_the_original(tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(save_model_for_vllm(tmp_path / "original"), dtype=torch.float32)
    layout = {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2}
    there = {"kind": "import", "source": str(tmp_path / "original"), "target": str(tmp_path / "run")}
    back = {"kind": "export", "source": str(tmp_path / "run"), "target": str(tmp_path / "exported")}
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([there | {"settings": layout}, back | {"settings": layout, "max_shard_bytes": 500_000}]))
    run_worker("tests.distributed.conversion_worker", [str(jobs)], 4)
    assert (tmp_path / "exported" / "model.safetensors.index.json").is_file()

    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(299, (length,), generator=generator) for length in (3, 17, 40, 130)]
    with VllmServer(SETTINGS, tmp_path / "exported", tmp_path / "server.log") as server:
        server.wait_until_ready()
        answers = [greedy(server, prompt.tolist()) for prompt in prompts]
        members = processes_with(str(server.port))
        assert len(members) >= 2  # the guard and the server at least
        shared = shared_memory_of(session_members(max(members)))
    assert processes_with(str(server.port)) == []
    assert shared and not any(map(os.path.exists, shared))
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = original.generate(prompt[None], max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
        assert answer == whole[0, len(prompt) :].tolist()
        assert len(set(answer)) > 3
