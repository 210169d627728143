"""Worker: syncs from one layout to servers that run already; greedy answers after each go to a file.

torchrun ... -m tests.end_to_end.sync_worker JOB.json: {"name", "model", "settings", "prompts",
"weights": [folder, ...], "servers", "out"}; the answers after each sync are written to "out", in order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.end_to_end.trainer import trainer


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found = []
    with trainer(Path(job["model"]), Path(job["out"]).parent / "logs", job["settings"]) as run:
        for number, folder in enumerate(job["weights"]):
            run.load(Path(folder))
            if run.rank == 0:
                assert run.sampler.is_stale() == (number == 0)
            report = run.sampler.sync(f"{job['name']}-{number}")
            assert run.rank != 0 or (report.servers == job["servers"] and not run.sampler.is_stale())
            found.append(run.greedy(job["prompts"]))
            # As many at once as there are servers and more: each server has the weights.
            together = run.answers(job["prompts"] * job["servers"])
            assert all(span.version == report.version for answer in together for span in answer.weight_versions)
    if run.rank == 0:
        Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
