"""What stands for the launcher of ranks, and for servers, so that the batch scripts' own logic is what takes time.

A trainer takes a step each STUB_SECONDS (0.3) up to run.steps, and writes what a run writes, on the first node. At the
notice it saves and ends. STUB_FAIL=N: it fails after N steps, of which none is saved. A line for each start, with node
and arguments, goes to RUN/starts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


def main(arguments: list[str]) -> int:
    """Returns an exit status."""
    settings = dict(text.split("=", 1) for text in arguments if "=" in text and not text.startswith("-"))
    run = Path(settings.get("run.folder", os.environ.get("STUB_RUN", ".")))
    run.mkdir(parents=True, exist_ok=True)
    node = os.environ.get("SLURMD_NODENAME", "?")
    kind = next(word for word in ("train", "serve", "evaluate") if word in arguments)
    with open(run / "starts", "a") as file:
        about = {
            "kind": kind,
            "node": node,
            "arguments": arguments,
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        }
        file.write(json.dumps(about) + "\n")
    if kind == "serve":
        return _serve(node)
    return _train(run, settings, arguments)


def _serve(node: str) -> int:
    print(json.dumps({"urls": [f"http://{node}:8000", f"http://{node}:8001"]}), flush=True)
    signal.sigwait([signal.SIGTERM])
    return 0


def _train(run: Path, settings: dict[str, str], arguments: list[str]) -> int:
    told = []

    def take(number: int, frame: FrameType | None) -> None:
        told.append(number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, take)
    first = any(text in ("--node-rank=0",) for text in arguments)
    steps, latest = int(settings.get("run.steps", 3)), run / "checkpoints" / "latest"
    step = int(latest.read_text()[5:]) if latest.exists() else 0
    begun = step
    if first:
        latest.parent.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(f"run:\n  steps: {steps}\n")
    while step < steps and not told:
        time.sleep(float(os.environ.get("STUB_SECONDS", "0.3")))
        step += 1
        if "STUB_FAIL" in os.environ and step - begun >= int(os.environ["STUB_FAIL"]):
            return 1
        if first:
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "time": time.time()}) + "\n")
    if first:
        latest.write_text(f"step_{step:08d}\n")
        (run / "told").write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
