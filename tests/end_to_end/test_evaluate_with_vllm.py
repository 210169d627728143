"""`evaluate` with a server of its own: a checkpoint and the folder it came from give the same greedy answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.cli import main
from tests.end_to_end.test_export_in_vllm import processes_with
from tests.tiny_tasks import save_task, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600), pytest.mark.usefixtures("process_as_it_was")]

_SERVER = ("rollout.dtype=float32", "rollout.max_model_len=64", "rollout.cpu_kv_cache_gib=1")
_EAGER = "rollout.extra_arguments=[--enforce-eager]"


def evaluated(model: Path, data: Path, output: Path) -> list[dict[str, Any]]:
    given = ["--data", f"gsm8k={data}", "--model", str(model), "--output", str(output), "--n", "2"]
    main(
        ["evaluate", "gsm8k", *given, "--max-tokens", "12", "--temperature", "0", *_SERVER, _EAGER, "reward.workers=1"]
    )
    assert processes_with(str(model)) == []
    lines = [json.loads(line) for line in (output / "gsm8k.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["id"], line["sample"]))


def test_a_checkpoint_and_the_folder_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = save_task(tmp_path / "task")
    data = write_rows(tmp_path / "rows.jsonl", [{"problem": f"w{n} w7", "answer": str(n)} for n in (5, 9, 31)])
    main(["convert", "hf-to-megatron", str(task / "model"), str(tmp_path / "start")])
    ours = evaluated(tmp_path / "start", data, tmp_path / "ours")
    theirs = evaluated(task / "model", data, tmp_path / "theirs")
    assert ours == theirs and len(ours) == 6
    assert all(1 <= line["tokens"] <= 12 and line["response"].startswith("w") for line in ours)
    assert {line["response"] for line in ours[:2]} == {ours[0]["response"]}  # at temperature 0
    summary = json.loads((tmp_path / "ours" / "summary.json").read_text())
    assert summary["benchmarks"]["gsm8k"]["problems"] == 3 and summary["plan"]["model"].endswith("start/step_00000000")
    assert "| gsm8k | 3 |" in capsys.readouterr().out
