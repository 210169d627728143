"""How far a run is, by what is in its folder."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_flowrl.cli import main
from megatron_flowrl.observe.status import status_of


def run_folder(folder: Path, recorded: int, saved: int | None, more: str = "") -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"run:\n  steps: 6\n{more}")
    lines = [json.dumps({"step": step, "time": time.time() - 90}) for step in range(1, recorded + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"step": 99, "ti')
    if saved is not None:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text(f"step_{saved:08d}\n")
    return folder


def test_before_its_first_step(tmp_path: Path) -> None:
    assert (
        status_of(tmp_path / "none").line() == "not begun: there is no config.yaml in the folder"
        and not status_of(tmp_path / "none").finished
    )
    status = status_of(run_folder(tmp_path / "run", 0, None))
    assert (status.saved, status.recorded, status.steps) == (0, 0, 6)


def test_in_between(tmp_path: Path) -> None:
    status = status_of(run_folder(tmp_path / "run", 4, 2))
    assert status.line().startswith("not finished: step 4 of 6, ") and status.line().endswith("checkpoint of step 2")
    assert status.age == pytest.approx(90, abs=5)


def test_checkpoints_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "latest").write_text("step_00000006\n")
    run = run_folder(tmp_path / "run", 6, 3, f"checkpoint:\n  save: {elsewhere}\n")
    assert status_of(run).saved == 6 and status_of(run).finished


def test_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", str(run_folder(tmp_path / "done", 6, 6))])
    assert capsys.readouterr().out.startswith("finished: step 6 of 6")
    with pytest.raises(SystemExit) as ended:
        main(["status", str(run_folder(tmp_path / "run", 4, 2)), "--saved"])
    assert ended.value.code == 75 and capsys.readouterr().out == "2\n"


def test_a_configuration_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path)])
    assert ended.value.code == 2 and "has no run.steps" in capsys.readouterr().err
