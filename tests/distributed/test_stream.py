"""The weight stream: whole tensors, once, in the announced order, on every rank of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import run_worker
from tests.tiny_models import save_model

pytestmark = pytest.mark.distributed


def test_the_stream_under_every_layout(tmp_path: Path) -> None:
    for name in ("qwen2_tied", "qwen3"):
        save_model(name, tmp_path / name)
    run_worker("tests.distributed.stream_worker", [str(tmp_path)], 4)
