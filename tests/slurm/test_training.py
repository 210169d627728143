"""True training through the batch script, on two nodes: ranks of torchrun, and vLLM on a node of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_flowrl.checkpoint.manifest import read_manifest
from tests.slurm.conftest import REPOSITORY, SCRIPTS, Cluster
from tests.tiny_tasks import SETTINGS, save_task, write_rows
from tests.training.recorded import arguments, metrics_of, write_records
from tests.training.test_restart import lines, state_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 6


def submit(
    cluster: Cluster, run: Path, given: list[str], *options: str, script: str = "train.sbatch", **more: str
) -> str:
    variables = {
        "FLOWRL_HOME": str(REPOSITORY),
        "FLOWRL_RANKS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "FLOWRL_PYTHON": sys.executable,
    }
    log = f"--output={run.parent}/job-%j.log"
    command = ["sbatch", "--parsable", "--nodes=2", log, *options, str(SCRIPTS / script), *given]
    return cluster.submit(command, **variables, **more)


def ends(cluster: Cluster, run: Path, job: str) -> str:
    path = run.parent / f"job-{job}.log"
    log = lambda: path.read_text()[-6000:] if path.exists() else "no log"  # noqa: E731
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")
    cluster.wait_for(lambda: cluster.state(job) in over, 400, log)
    assert cluster.state(job) == "COMPLETED", log()
    return path.read_text()


def test_two_nodes_with_notice_end_in_the_weights_of_an_undisturbed_run(cluster: Cluster, tmp_path: Path) -> None:
    task = save_task(tmp_path / "task")
    write_records(task, task / "records", STEPS)
    settings: dict[str, Any] = {"run__steps": STEPS, "objective__preset": "exact", "checkpoint__save_interval": 100}

    def given(run: Path) -> list[str]:
        return arguments(task, task / "records", run, **settings)[1:]  # without `train`

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = submit(cluster, cut, given(cut))
    cluster.wait_for(lambda: lines(cut) >= 2, 200, lambda: str([*tmp_path.glob("job-*.log")]))
    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    log = ends(cluster, cut, job)
    assert "notice: the run saves and ends" in log and f"of {STEPS}, which is saved" in log and "finished" in log
    assert "2 ranks = TP1 x PP1 x CP1 x DP2" in log
    ends(cluster, whole, submit(cluster, whole, given(whole)))
    assert [line["step"] for line in metrics_of(cut)] == [*range(1, STEPS + 1)]
    expected, found = state_of(whole, tmp_path / "whole.pt"), state_of(cut, tmp_path / "cut.pt")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_weights_reach_a_node_that_samples(cluster: Cluster, tmp_path: Path) -> None:
    task, run = save_task(tmp_path / "task"), tmp_path / "run"
    settings: dict[str, Any] = SETTINGS | {
        "model.path": task / "model",
        "prompts.path": task / "train.jsonl",
        "run.folder": run,
        "run.steps": 2,
        "rollout.transfer": "gloo",
    }
    given = [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in settings.items()]
    job = submit(cluster, run, given, FLOWRL_SAMPLER_NODES="1")
    log = ends(cluster, run, job)
    assert "waiting for vLLM on node2" in log and "on node1, 1 ranks each" in log
    for line in metrics_of(run):
        assert line["mismatch/mean_abs_diff"] < 1e-4  # the sampler has the trainer's weights, step by step
        assert line["update/first_weight_max"] == 1.0


def test_a_conversion_on_two_nodes_and_an_evaluation_that_is_given_notice(cluster: Cluster, tmp_path: Path) -> None:
    task = save_task(tmp_path / "task")
    given = ["hf-to-megatron", str(task / "model"), str(tmp_path / "start")]
    layout = "parallel.tensor_model_parallel_size=2"
    ends(cluster, tmp_path / "x", submit(cluster, tmp_path / "x", [*given, layout], script="convert.sbatch"))
    assert read_manifest(tmp_path / "start" / "step_00000000").layout["tensor_model_parallel_size"] == 2

    rows = [{"problem": f"w{number} w7", "answer": str(number)} for number in range(2, 42)]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "evaluation"
    given = ["gsm8k", "--data", f"gsm8k={data}", "--model", str(tmp_path / "start"), "--output", str(out), "--n", "4"]
    server = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items() if name.startswith("rollout.")]
    given += ["--max-tokens", "12", *server, "reward.workers=1"]
    job = submit(cluster, tmp_path / "x", given, "--nodes=1", script="evaluate.sbatch")
    log = tmp_path / f"job-{job}.log"
    cluster.wait_for(lambda: log.exists() and "starting" in log.read_text(), 200, lambda: log.read_text())
    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    said = ends(cluster, tmp_path / "x", job)
    assert "notice: the evaluation ends" in said and "requeued" in said
    assert len((out / "gsm8k.jsonl").read_text().splitlines()) == 160 and (out / "summary.json").exists()
