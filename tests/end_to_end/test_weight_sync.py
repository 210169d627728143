"""After a sync from any layout, a server answers as a fresh one that was loaded from the exported folder.

Two servers run for the whole module, one for a tied and one for an untied model; they start with the weights A, and
get B and A again and again. What a fresh server answers is asked once. Prompts of 300 tokens are asked before and after
every sync: they fill whole blocks of the prefix cache, which would answer with the weights before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_flowrl.config import RolloutConfig
from megatron_flowrl.rollout.server import VllmServer
from tests.distributed.layouts import parallel
from tests.distributed.ranks import run_worker
from tests.end_to_end.test_export_in_vllm import greedy
from tests.tiny_models import save_model_for_vllm

pytestmark = pytest.mark.distributed

SETTINGS = RolloutConfig(dtype="float32", max_model_len=384, cpu_kv_cache_gib=1, extra_arguments=("--enforce-eager",))
LENGTHS = (3, 17, 129, 300, 300)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_rank": (1, {}),
    "tp2": (2, parallel(tp=2)),
    "pp2": (2, parallel(pp=2)),
    "tp2_pp2": (4, parallel(tp=2, pp=2)),
    "pp2_vpp2": (2, parallel(pp=2, vpp=2)),
    "dp2": (2, {}),
}


@dataclass
class Kind:
    """A model in two sets of weights, a server that started with A, and what fresh servers answer."""

    folders: dict[str, Path]
    server: VllmServer
    prompts: list[list[int]]
    expected: dict[str, list[list[int]]]


def export(source: Path, folder: Path) -> Path:
    """`source`, imported and exported again under TP2 x PP2."""
    jobs = folder.parent / f"{folder.name}.json"
    layout = {"settings": parallel(tp=2, pp=2)}
    there = {"kind": "import", "source": str(source), "target": f"{folder}.run"}
    back = {"kind": "export", "source": f"{folder}.run", "target": str(folder)}
    jobs.write_text(json.dumps([there | layout, back | layout]))
    run_worker("tests.distributed.conversion_worker", [str(jobs)], 4)
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kind]]:
    """By transfer: shm serves the tied model, gloo the untied one."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(299, (length,), generator=generator).tolist() for length in LENGTHS]
    found: dict[str, Kind] = {}
    with ExitStack() as stack, ExitStack() as for_now:
        fresh: dict[str, VllmServer] = {}
        for transfer, tied in (("shm", True), ("gloo", False)):
            folder = tmp_path_factory.mktemp(transfer)
            folders = {name: save_model_for_vllm(folder / name, tied=tied, seed=seed) for seed, name in enumerate("AB")}
            server = VllmServer(SETTINGS, folders["A"], folder / "server.log", transfer=transfer)
            found[transfer] = Kind(folders, stack.enter_context(server), prompts, {})
            exported = export(folders["B"], folder / "exported")
            fresh[transfer] = for_now.enter_context(VllmServer(SETTINGS, exported, folder / "fresh.log"))
        for transfer, kind in found.items():
            for name, server in (("A", kind.server), ("B", fresh[transfer])):
                server.wait_until_ready()
                kind.expected[name] = [greedy(server, prompt) for prompt in prompts]
            assert kind.expected["A"] != kind.expected["B"]
        for_now.close()
        yield found


def sync(kind: Kind, transfer: str, layout: str, rounds: str, folder: Path) -> list[list[list[int]]]:
    """Syncs of the weights in `rounds`, one after the other, from a trainer under a layout."""
    ranks, settings = LAYOUTS[layout]
    job = {
        "name": layout,
        "model": str(kind.folders["A"]),
        "settings": settings | {"generation.urls": [kind.server.url], "rollout.transfer": transfer},
        "prompts": kind.prompts,
        "weights": [str(kind.folders[name]) for name in rounds],
        "servers": 1,
        "out": str(folder / "answers.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    run_worker("tests.end_to_end.sync_worker", [str(folder / "job.json")], ranks)
    answers: list[list[list[int]]] = json.loads((folder / "answers.json").read_text())
    return answers


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2_pp2", "pp2_vpp2"])
@pytest.mark.parametrize("transfer", ["shm", "gloo"])
def test_answers_are_those_of_a_fresh_server(
    kinds: dict[str, Kind], transfer: str, layout: str, tmp_path: Path
) -> None:
    kind = kinds[transfer]
    answers = sync(kind, transfer, layout, "BAB", tmp_path)
    assert answers == [kind.expected["B"], kind.expected["A"], kind.expected["B"]]


@pytest.mark.parametrize(("transfer", "layout"), [("shm", "one_rank"), ("gloo", "dp2")])
def test_ten_syncs_in_a_row(kinds: dict[str, Kind], transfer: str, layout: str, tmp_path: Path) -> None:
    kind = kinds[transfer]
    assert sync(kind, transfer, layout, "AB" * 5, tmp_path) == [kind.expected[name] for name in "AB" * 5]
