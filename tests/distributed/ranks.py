"""Run one of this folder's worker modules on several gloo ranks, bounded in time, leaving no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_module(
    module: str, arguments: Sequence[str], ranks: int, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m module arguments` on `ranks` processes; its output is returned, whatever its status."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
        "-m", module, *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{module} on {ranks} ranks took more than {timeout} s:\n{output[-6000:]}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def run_worker(module: str, arguments: Sequence[str], ranks: int, timeout: float = 240.0) -> str:
    """`run_module` for a worker that has to succeed; returns its output."""
    done = run_module(module, arguments, ranks, timeout)
    assert done.returncode == 0, f"{module} on {ranks} ranks failed:\n{done.stdout[-6000:]}"
    return done.stdout
