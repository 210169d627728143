"""The folder of a run's checkpoints: what is in it, which is the latest, which are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_flowrl.checkpoint.folder import CheckpointFolder, find_checkpoint
from megatron_flowrl.config import UserError
from megatron_flowrl.platform.atomic import partial_path


def save(folder: CheckpointFolder, step: int) -> None:
    partial = partial_path(folder.path_of(step), "x")
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text(str(step))
    folder.commit(partial, step)


def test_committing_moves_latest(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    assert folder.steps() == [] and folder.latest() is None
    for step in (3, 12, 100_000_000):
        save(folder, step)
        assert folder.latest() == step
    assert folder.steps() == [3, 12, 100_000_000]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 3)
    (folder.path_of(3) / "old").touch()
    save(folder, 3)
    assert folder.steps() == [3] and not (folder.path_of(3) / "old").exists()


def test_pruning_keeps_the_newest_and_the_latest(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in range(1, 6):
        save(folder, step)
    assert folder.prune(2) == [1, 2, 3]
    assert folder.steps() == [4, 5]
    (tmp_path / "latest").write_text("step_00000004\n")
    assert folder.prune(1) == []


def test_sweeping_takes_only_what_was_cut_off(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    partial_path(folder.path_of(2), "y").mkdir()
    partial_path(tmp_path / "latest", "7").touch()
    (tmp_path / "notes.txt").touch()
    folder.sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "notes.txt", "step_00000001"]


def test_a_replacement_that_is_cut_off_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 3)
    (folder.path_of(3) / "first").touch()

    def killed(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_flowrl.checkpoint.folder.publish", killed)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 3)
    assert folder.steps() == []
    folder.sweep()
    assert folder.steps() == [3] and (folder.path_of(3) / "first").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_what_is_set_aside_does_not_count(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 30):
        save(folder, step)
    assert folder.set_aside(30) == tmp_path / "damaged_step_00000030"
    folder.point_to(2)
    save(folder, 30)
    folder.set_aside(30)  # once more
    assert folder.steps() == [1, 2]
    assert folder.prune(2) == []


def test_a_trainers_latest_beside_a_model_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "latest").write_text("global_step500")  # DeepSpeed's
    assert find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("content", ["", "step_", "step_00000001 x", "../elsewhere", "\x00"])
def test_a_latest_that_cannot_be_understood(tmp_path: Path, content: str) -> None:
    (tmp_path / "latest").write_text(content)
    with pytest.raises(UserError, match=r"latest holds .* it should hold the name of a checkpoint"):
        CheckpointFolder(tmp_path).latest()


def test_what_a_path_means(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    assert find_checkpoint(tmp_path) is None
    save(folder, 4)
    save(folder, 7)
    assert find_checkpoint(folder.root) == folder.path_of(7)
    assert find_checkpoint(folder.path_of(4)) == folder.path_of(4)
    (folder.root / "latest").write_text("step_00000009")
    with pytest.raises(UserError, match="names step_00000009, which is not there; there are step_00000004, step_0"):
        find_checkpoint(folder.root)
    (folder.root / "latest").unlink()
    with pytest.raises(UserError, match="no file 'latest': give one of its folders"):
        find_checkpoint(folder.root)
