"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_flowrl.platform import atomic


def test_a_folder_gets_its_name_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint"
    partial = atomic.partial_path(final, "abc")
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / "file").write_text("content")
    assert atomic.is_partial(partial) and not atomic.is_partial(final) and partial.parent == final.parent
    atomic.publish(partial, final)
    assert (final / "sub" / "file").read_text() == "content" and not partial.exists()


def test_writing_a_file_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    for content in ("one", "two"):
        atomic.write_file(path, content)
        assert path.read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    atomic.write_file(path, "one")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_file(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_removing_cut_off_midway_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        atomic.remove(folder)
    assert not folder.exists()
    (left,) = tmp_path.iterdir()
    assert atomic.is_partial(left) and list(atomic.partials_in(tmp_path)) == [left]


def test_partial_files_are_removed_too(tmp_path: Path) -> None:
    partial = atomic.partial_path(tmp_path / "latest", "7")
    partial.write_text("")
    atomic.remove(partial)
    assert not partial.exists()
    assert not list(atomic.partials_in(tmp_path / "nowhere"))
