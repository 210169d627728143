"""What the watchdog hears of within an update: every micro-batch, and the wait for others at the end of a pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_flowrl.cli import main
from megatron_flowrl.training.watchdog import Watchdog
from tests.tiny_tasks import save_task
from tests.training.recorded import arguments, write_records


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.usefixtures("process_as_it_was")
def test_micro_batches_are_signs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[bool] = []
    monkeypatch.setattr(Watchdog, "beat", lambda *_: None)
    monkeypatch.setattr(Watchdog, "sign", lambda _, waiting=False: signs.append(waiting))
    task = save_task(tmp_path / "task")
    given = arguments(task, write_records(task, tmp_path / "records", 1), tmp_path / "run", run__steps=1)
    if command == "sft":
        kept = [
            one for one in given[1:] if one.startswith(("precision.", "model.", "run.steps", "run.folder", "data."))
        ]
        given = ["sft", *kept, f"sft.path={task / 'sft.jsonl'}", "sft.validation_share=0", "sft.sequences_per_step=64"]
    main(given)
    assert signs.count(True) >= 1 and signs.count(False) - signs.count(True) >= 4  # one ends each wait
