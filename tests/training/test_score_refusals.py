"""What `megatron-flowrl score` refuses, and how it writes: nothing is lost, whatever goes wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from megatron_flowrl.config import UserError
from megatron_flowrl.training import score, session
from tests.training.conftest import TORCHRUN, Run
from tests.training.score_inputs import (
    BAD_INPUTS,
    LINES,
    ODD_INPUTS,
    BadInput,
    Command,
    run_main,
    run_process,
)

pytestmark = pytest.mark.usefixtures("process_as_it_was")


# What is refused


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that lies in a folder: mode and, of files, time of change and content."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (
            (status.st_mode, status.st_mtime_ns, path.read_bytes()) if path.is_file() else (status.st_mode,)
        )
    return found


def refused(case: BadInput, command: Command, run: Run) -> None:
    """Refused with a message, every file as it was: without a previous output, then with one."""
    case.spoil(command)
    names = {"folder": command.folder, "model": command.model}
    for previous in (False, True):
        if previous:
            if command.output.exists() or not command.output.parent.is_dir():
                break
            command.output.write_text("previous\n")
        before = snapshot(command.folder)
        outcome = run(command)
        assert outcome.status == 2 and outcome.out == ""
        for text in case.says:
            assert text.format(**names) in outcome.err
        assert "error:" in outcome.err and "Traceback" not in outcome.err
        assert len(outcome.err) < 4000, "a message is read by people"
        assert snapshot(command.folder) == before


@pytest.fixture
def no_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> NoReturn:
        pytest.fail("the model was built before the input was refused")

    monkeypatch.setattr(score, "build_parallel_model", build)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name: str, command: Command, run: Run) -> None:
    refused(BAD_INPUTS[name], command, run)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize("name", ODD_INPUTS)
def test_odd_input_is_refused(name: str, command: Command, run: Run) -> None:
    refused(ODD_INPUTS[name], command, run)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have FP8")
def test_fp8_weights_are_refused_on_the_cpu(command: Command, run: Run) -> None:
    command.overrides = ["precision.dtype=bfloat16", "precision.fp8=hybrid", "precision.fp8_param_gather=true"]
    refused(BadInput(lambda _: None, ("precision.fp8_param_gather = true", "GPU", "emulated")), command, run)


def test_a_name_too_long_is_refused_before_the_work(no_model_is_built: None, run: Run, command: Command) -> None:
    command.output = command.output.parent / ("x" * 300)
    outcome = run(command)
    assert outcome.status == 2 and "--output" in outcome.err and "too long" in outcome.err


def test_a_link_as_output_stays_one(run: Run, command: Command) -> None:
    real = command.folder / "real.jsonl"
    command.output.symlink_to(real)
    assert run(command).status == 0
    assert command.output.is_symlink() and real.read_text()


def test_several_problems_are_told_at_once(run: Run, command: Command) -> None:
    command.overrides += ["seed=-1", "log_prob.temprature=2", "optimizer.lr=1"]
    outcome = run(command)
    assert outcome.status == 2
    assert all(name in outcome.err for name in ("3 problems", "seed = -1", "log_prob.temprature", "optimizer.lr"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "command"),
        (["fly"], "'fly'"),
        (["score"], "--input, --output"),
        (["score", "--input", "in.jsonl"], "--output"),
        (["score", "--input", "in.jsonl", "--output", "out.jsonl"], "model.path"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_main(arguments)
    assert outcome.status == 2 and says in outcome.err
    assert not any(tmp_path.iterdir())


def test_help_has_every_setting_that_is_read_and_no_other() -> None:
    outcome = run_main(["score", "--help"])
    assert outcome.status == 0
    read = ("--model", "--recipe", "log_prob.entropy", "model.init", "parallel.context_parallel_size", "seed")
    assert all(name in outcome.out for name in read)
    assert "optimizer.lr" not in outcome.out and "ddp." not in outcome.out


def test_a_problem_that_only_the_second_rank_meets_before_they_are_joined_is_told(
    run: Run, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as more processes than GPUs."""

    def current_platform(local_rank: int) -> NoReturn:
        raise UserError(f"local rank {local_rank} has no GPU")

    monkeypatch.setattr(session, "current_platform", current_platform)
    command.environment = dict(zip(TORCHRUN, ("1", "2", "1", "localhost", "1"), strict=True))
    outcome = run(command)
    assert outcome.status == 2 and "local rank 1 has no GPU" in outcome.err


# Writing


@pytest.mark.parametrize("previous", [None, "previous\n"])
def test_an_interrupted_write_leaves_the_previous_output(
    previous: str | None, run: Run, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last moment: the new file is there, and not yet in place."""
    if previous is not None:
        command.output.write_text(previous)
    before = snapshot(command.folder)
    monkeypatch.setattr(os, "replace", raising(KeyboardInterrupt()))
    assert run(command).status == 130
    assert snapshot(command.folder) == before
    assert not dist.is_initialized()


def test_an_output_that_cannot_be_put_in_place(run: Run, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command.output.write_text("previous\n")
    before = snapshot(command.folder)
    monkeypatch.setattr(os, "replace", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    outcome = run(command)
    assert outcome.status == 2
    assert f"--output '{command.output}'" in outcome.err and os.strerror(errno.EIO) in outcome.err
    assert snapshot(command.folder) == before


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise error

    return fail


def test_a_full_disk_in_the_middle_of_the_write(command: Command) -> None:
    """Played by the process's limit on the size of a file."""
    resource = pytest.importorskip("resource")
    command.input.write_text("".join(LINES * 5))
    command.output.write_text("previous\n")
    before = snapshot(command.folder)
    limit = 4096
    outcome = run_process(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert outcome.status == 2, outcome.err
    assert f"--output '{command.output}'" in outcome.err and os.strerror(errno.EFBIG) in outcome.err
    assert "Traceback" not in outcome.err
    assert snapshot(command.folder) == before
