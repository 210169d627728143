"""Import and export hold a rank's share and a bucket, not the model: measured by the benchmark, on a smaller model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.ranks import REPOSITORY

pytestmark = pytest.mark.distributed

MEGA = 2**20
SLACK = 12 * MEGA  # buffers of files and of the allocator


def test_no_rank_holds_more_than_its_share_and_a_bucket() -> None:
    bucket = 24 * MEGA
    options = {"--layers": 20, "--hidden": 512, "--vocab": 8000, "--small-layers": 1, "--bucket-bytes": bucket}
    done = subprocess.run(
        [sys.executable, "benchmarks/checkpoint.py", *(str(x) for option in options.items() for x in option)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    measured = json.loads(done.stdout)["conversions"]
    share, total = measured["share_bytes"], measured["bytes"]
    assert total > share + bucket + 2 * SLACK  # or nothing would be shown
    assert 5 * measured["largest_tensor_bytes"] / 2 <= bucket  # a part, gathered, and gloo's own copy fit
    for what in ("import", "export"):
        assert 0.5 * share < measured[what]["peak_bytes"] <= share + bucket + SLACK, (what, measured)
    assert measured["stream"]["peak_bytes"] <= bucket + SLACK, measured
