"""Worker: runs commands of `megatron-flowrl` one after the other in one process: importing takes longer than they do.

python -m tests.gpu.worker JOBS.json OUT.json, {name: arguments} -> {name: {"status", "said", "seconds", "peak_bytes"}}
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch


def run(arguments: list[str]) -> dict[str, Any]:
    """One command; `status` 0 where it ended well."""
    from megatron_flowrl.cli import main

    said, status, began = io.StringIO(), 0, time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            status = 1
            traceback.print_exc()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    seconds = time.perf_counter() - began
    return {"status": status, "said": said.getvalue()[-6000:], "seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    outcomes = {}
    for name, arguments in jobs.items():
        outcomes[name] = run(arguments)
        print(name, outcomes[name]["status"], f"{outcomes[name]['seconds']:.1f} s", flush=True)
        Path(sys.argv[2]).write_text(json.dumps(outcomes, indent=1))
