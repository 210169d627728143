"""The batch scripts on a real SLURM of two nodes: what they start where, and what they make of how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.cli import TRAIN_SECTIONS
from megatron_flowrl.config import check_config, load_config
from tests.slurm.conftest import REPOSITORY, SCRIPTS, Cluster

pytestmark = pytest.mark.timeout(300)

SUBMIT = [sys.executable, str(SCRIPTS / "submit.py")]
STEPS = 30


def sbatch(
    cluster: Cluster,
    stub: dict[str, str],
    run: Path,
    *options: str,
    steps: int = STEPS,
    more: Sequence[str] = (),
    **variables: str,
) -> str:
    settings = [f"run.folder={run}", f"run.steps={steps}", *more]
    log = f"--output={run.parent}/job-%j.log"
    command = ["sbatch", "--parsable", "--gpus-per-node=2", log, *options, str(SCRIPTS / "train.sbatch"), *settings]
    return cluster.submit(command, **stub, **variables)


def log_of(run: Path, job: str) -> str:
    path = run.parent / f"job-{job}.log"
    return path.read_text() if path.exists() else "no log"


def starts(run: Path) -> list[dict[str, Any]]:
    path = run / "starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ends(cluster: Cluster, run: Path, job: str, state: str = "COMPLETED", seconds: float = 90.0) -> None:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")
    cluster.wait_for(lambda: cluster.state(job) in over, seconds, lambda: cluster.state(job) + log_of(run, job))
    assert cluster.state(job) == state, log_of(run, job)


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_two_nodes_train(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = sbatch(cluster, stub, run, "--nodes=2", steps=2)
    ends(cluster, run, job)
    assert "finished" in log_of(run, job)
    found = sorted(starts(run), key=lambda one: str(one["node"]))
    assert [one["node"] for one in found] == ["node1", "node2"]
    for rank, one in enumerate(found):
        given = one["arguments"]
        assert {"--nnodes=2", "--nproc-per-node=2", f"--node-rank={rank}", "--master-addr=127.0.0.1"} <= {*given}
        assert given[given.index("train") :] == ["train", f"run.folder={run}", "run.steps=2"]


def test_notice_saves_and_the_job_goes_on(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = sbatch(cluster, stub, run, "--nodes=1")
    cluster.wait_for(lambda: steps_done(run) >= 2, why=lambda: log_of(run, job))
    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    cluster.wait_for(lambda: len(starts(run)) == 2, why=lambda: log_of(run, job))
    ends(cluster, run, job)
    log = log_of(run, job)
    assert log.count("notice: the run saves and ends") == 1 and "requeued" in log and "finished" in log
    assert [one["restart"] for one in starts(run)] == ["0", "1"]
    recorded = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert recorded == [*range(1, STEPS + 1)]  # none lost, none twice


def test_preemption_saves_and_the_job_goes_on(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = sbatch(cluster, stub, run, "--nodes=2")
    cluster.wait_for(lambda: steps_done(run) >= 2, why=lambda: log_of(run, job))
    other = cluster.submit(
        ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 3"]
    )
    cluster.wait_for(lambda: cluster.state(other) == "COMPLETED", 60, lambda: log_of(run, job))
    ends(cluster, run, job)
    assert "notice: the run saves and ends" in log_of(run, job)
    recorded = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert recorded == [*range(1, STEPS + 1)]


def test_failures_without_a_checkpoint_end_it(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = sbatch(cluster, stub, run, "--nodes=1", STUB_FAIL="1", STUB_SECONDS="0", FLOWRL_TRIES="2")
    ends(cluster, run, job, "FAILED")
    assert len(starts(run)) == 2 and "2 starts in a row have ended" in log_of(run, job)
    status = cluster.run([*SUBMIT, "status", str(run)])
    assert f"not finished: step 0 of {STEPS}" in status.stdout and "failed without a new checkpoint: 2" in status.stdout


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = sbatch(cluster, stub, run, "--nodes=1", steps=1000)
    cluster.wait_for(lambda: steps_done(run) >= 2, why=lambda: log_of(run, job))
    cluster.run(["scancel", job])
    ends(cluster, run, job, "CANCELLED")
    time.sleep(8)  # longer than a requeued job is held
    assert cluster.state(job) == "CANCELLED" and len(starts(run)) == 1


def test_nodes_that_serve(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    described = ["rollout.servers=8", "rollout.quantization=fp8_per_block"]
    job = sbatch(cluster, stub, run, "--nodes=2", steps=2, more=described, FLOWRL_SAMPLER_NODES="1")
    ends(cluster, run, job)
    serving, training = sorted(starts(run), key=lambda one: str(one["kind"]))
    assert (serving["node"], training["node"]) == ("node2", "node1")
    assert serving["arguments"][2:4] == ["serve", "--for-training"] and "rollout.host=127.0.0.1" in serving["arguments"]
    given = training["arguments"]
    assert 'generation.urls=["http://node2:8000", "http://node2:8001"]' in given and "--nnodes=1" in given
    assert serving["arguments"][-2:] == ["--logs", f"{run}/slurm/vllm_node2"]
    # The trainer's own check lets them pass, although the recipe says how servers are started.
    settings = ["model.path=/m", "prompts.path=/p", *given[given.index("train") + 1 :]]
    check_config(load_config(None, settings, TRAIN_SECTIONS, "train"))


def test_a_server_that_does_not_start(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run, python = tmp_path / "run", Path(stub["FLOWRL_PYTHON"])
    ends_at_once = 'case "$*" in *"megatron_flowrl serve"*) echo no; exit 3;; esac'
    python.write_text(python.read_text().replace("case", f"{ends_at_once}\ncase", 1))
    job = sbatch(cluster, stub, run, "--nodes=2", FLOWRL_SAMPLER_NODES="1", FLOWRL_TRIES="1")
    ends(cluster, run, job, "FAILED")
    log = log_of(run, job)
    assert "vLLM on node2 has ended; the end of its log:" in log and "\nno\n" in log and starts(run) == []


def test_a_lost_node(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = sbatch(cluster, stub, run, "--nodes=2")
    cluster.wait_for(lambda: steps_done(run) >= 2, why=lambda: log_of(run, job))
    cluster.stop("node2")
    cluster.run(["scontrol", "update", "nodename=node2", "state=down", "reason=lost"])
    cluster.wait_for(lambda: cluster.state(job) == "PENDING", 60, lambda: cluster.state(job))
    cluster.start("node2")
    cluster.run(["scontrol", "update", "nodename=node2", "state=resume"])
    ends(cluster, run, job)
    assert {one["restart"] for one in starts(run)} == {"0", "1"} and "finished" in log_of(run, job)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (["--nodes=1"], {"run": "relative"}, "run.folder=/ABSOLUTE/PATH has to be among the arguments"),
        (["--nodes=2"], {"FLOWRL_SAMPLER_NODES": "2"}, "FLOWRL_SAMPLER_NODES=2 leaves no node of 2 to train on"),
        (["--nodes=1"], {"FLOWRL_IMAGE": "/x.sif"}, "FLOWRL_IMAGE is set, and there is neither Pyxis"),
    ],
)
def test_what_cannot_run_is_refused(
    options: list[str], more: dict[str, str], message: str, cluster: Cluster, stub: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = Path(more["run"]) if "run" in more else run
    log = f"--output={tmp_path}/job-%j.log"
    command = ["sbatch", "--parsable", "--gpus-per-node=2", log, *options, str(SCRIPTS / "train.sbatch")]
    variables = {name: value for name, value in more.items() if name != "run"}
    job = cluster.submit([*command, f"run.folder={given}", "run.steps=1"], **stub, **variables)
    ends(cluster, run, job, "FAILED")
    assert message in log_of(run, job)


def test_submit(cluster: Cluster, stub: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {steps: 3, prompts_per_step: 8, prompts_per_mini_batch: 8}\n")
    settings = [str(recipe), f"run.folder={run}", "model.path=/m", "rollout.replay=/r"]
    command = [*SUBMIT, "train", *settings, "--gpus-per-node", "2", "--chain", "2"]
    done = cluster.run([*command, "parallel.tensor_model_parallel_size=2"], **stub)
    assert done.returncode == 0, done.stderr
    first, second = (line.split()[1].rstrip(",") for line in done.stdout.splitlines())
    shown = cluster.run(["scontrol", "show", "job", second]).stdout
    assert f"Dependency=afterany:{first}" in shown
    for job in (first, second):
        ends(cluster, run / "slurm" / "x", job)
    assert len(starts(run)) == 2 and "finished: step 3 of 3" in cluster.run([*SUBMIT, "status", str(run)]).stdout
    refused = cluster.run([*command, "--nodes", "9"], **stub)
    assert refused.returncode == 2 and "sbatch refused" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.folder=relative"], "run.folder = 'relative' has to be absolute"),
        (["parallel.tensor_model_parallel_size=16"], "is more than the 8 GPUs of a node"),
        (["parallel.tensor_model_parallel_size=3"], "does not divide the 8 GPUs of a node"),
        (["parallel.pipeline_model_parallel_size=3", "--nodes", "1"], "8 processes cannot be shared out evenly"),
        (["rollout.replay=null"], "all 8 GPUs train and none samples"),
        (["rollout.replay=null", "--sampler-nodes", "1", "rollout.servers=9"], "take 9 GPUs, and a node has 8"),
        (["--sampler-nodes", "1"], "rollout.replay needs none"),
        (["--notice", "30"], "give more than 60 s"),
        (["--name", "a/b"], "cannot be a job's"),
        (["--nodes", "100"], "are fewer than the 800 data-parallel ranks"),
        (["optimiser.lr=1"], "did you mean optimizer.lr"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_queued(settings: list[str], message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run: {folder: /run, prompts_per_step: 8, prompts_per_mini_batch: 8}\n"
        "model: {path: /m}\nrollout: {replay: /r}\n"
    )
    given = [str(recipe), "--gpus-per-node", "8", "--dry-run"]
    done = subprocess.run([*SUBMIT, "train", *given, *settings], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


def test_every_script_is_accepted(cluster: Cluster) -> None:
    for script in sorted(SCRIPTS.glob("*.sbatch")):
        done = cluster.run(["sbatch", "--test-only", "--nodes=1", "--gpus-per-node=2", str(script)])
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    done = cluster.run(["sbatch", "--test-only", "--nodes=3", str(SCRIPTS / "train.sbatch")])
    assert done.returncode != 0


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not here")
    files = sorted(map(str, [*SCRIPTS.glob("*.sbatch"), *SCRIPTS.glob("*.sh")]))
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True, cwd=REPOSITORY)
    assert len(files) >= 4 and done.stdout == "" and done.returncode == 0
