"""Records of rollouts: whole or refused, bit for bit what was sampled."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_flowrl.config import UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.platform import atomic
from megatron_flowrl.rollout.generation import VersionSpan
from megatron_flowrl.rollout.record import RecordFolder, RolloutRecord, decode


def make_record(step: int = 3) -> RolloutRecord:
    sequences = (TokenSequence((1, 2), (3, 4, 5)), TokenSequence((1, 2), ()), TokenSequence((70_000,), (6,)))
    return RolloutRecord(
        step=step,
        position=16,
        source="digest",
        prompt_numbers=(7, 7, 2),
        sequences=sequences,
        groups=(0, 0, 1),
        rewards=(1.0, 0.1, -2.5),
        log_probs=torch.tensor([-0.1, -1.5, -2.25, -1e-8]),
        finish_reasons=("stop", "length", "stop"),
        keys=("1+2", None, 'odd "key"\n\x00'),
        problems=(None, "time limit", None),
        weight_versions=((VersionSpan("2", 0, 3),), (), (VersionSpan("1", 0, 1),)),
        seconds={"generate": 0.5},
    )


def assert_equal(one: RolloutRecord, other: RolloutRecord) -> None:
    for field in fields(RolloutRecord):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, field.name


def test_a_record_comes_back_as_it_was() -> None:
    record = make_record()
    found = decode(record.encode(), "it")
    assert_equal(found, record)
    assert (found.prompts, found.next_position) == (2, 18)
    assert [len(part) for part in found.answer_log_probs()] == [3, 0, 1]
    assert found.answer_log_probs()[2] == [torch.tensor(-1e-8).item()]


def test_a_step_without_answers_can_be_recorded() -> None:
    empty = replace(
        make_record(),
        prompt_numbers=(),
        sequences=(),
        groups=(),
        rewards=(),
        log_probs=torch.zeros(0),
        finish_reasons=(),
        keys=(),
        problems=(),
        weight_versions=(),
    )
    assert_equal(decode(empty.encode(), "it"), empty)


def test_no_byte_may_change() -> None:
    """But for spaces, by which the format fills up its header."""
    original = make_record().encode()
    header = 8 + int.from_bytes(original[:8], "little")
    blank = header - (len(original[:header]) - len(original[:header].rstrip(b" ")))
    for place in [*range(0, blank, 7), *range(header, len(original))]:
        content = bytearray(original)
        content[place] ^= 4
        with pytest.raises(UserError):
            decode(bytes(content), "it")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_record_that_was_cut_off_is_refused(length: int) -> None:
    with pytest.raises(UserError, match="no whole record"):
        decode(make_record().encode()[:length], "it")


def test_another_format_is_named() -> None:
    content = make_record().encode().replace(b'"format":"1"', b'"format":"9"')
    with pytest.raises(UserError, match="its format is 9, and this program reads 1"):
        decode(content, "it")


def test_a_folder_of_records(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path / "rollouts")
    assert folder.steps() == [] and folder.read(1) is None
    for step in (1, 2, 3, 10):
        folder.write(step, make_record(step).encode())
    assert folder.steps() == [1, 2, 3, 10]
    assert not list(atomic.partials_in(folder.root))
    content = folder.read(2)
    assert content is not None and decode(content, "it").step == 2
    folder.prune(1, consumed=3)
    assert folder.steps() == [3, 10], "10 is not in a checkpoint yet, and one of the others is kept"


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file in its place")
    with pytest.raises(UserError, match="cannot be written"):
        RecordFolder(tmp_path / "rollouts").write(1, b"")
