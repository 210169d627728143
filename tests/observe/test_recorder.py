"""Metrics, samples and TensorBoard files: nothing twice, nothing half, and a full disk ends nothing."""

from __future__ import annotations

import builtins
import json
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_flowrl.config import TrackingConfig, UserError
from megatron_flowrl.observe import growing, tensorboard
from megatron_flowrl.observe.recorder import Recorder, Sample

SETTINGS = {"seed": 1, "flowrl": {"beta": 15.0, "reward": "raw | `x`"}, "prompts": {"limit": None}}


def opened(folder: Path, resume_step: int = 0, **tracking: Any) -> Recorder:
    return Recorder(folder, TrackingConfig(**tracking), resume_step=resume_step, hyper_parameters=SETTINGS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def read_back(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return found.Reload()


def scalars(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 5)) for event in found.Scalars(tag)]


def sample(number: int, response: str = "answer") -> Sample:
    return Sample(f"prompt {number}", response, 0.5, f"key {number}")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the kernel writes what fits, and then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_line_a_step_as_it_comes(tmp_path: Path) -> None:
    with opened(tmp_path, samples=2) as recorder:
        recorder.record(1, {"rollout/reward_mean": 0.5, "update/loss": float("nan")}, {}, [sample(n) for n in range(3)])
        (line,) = lines(tmp_path / "metrics.jsonl")  # before anything is closed
        assert list(line) == ["step", "time", "rollout/reward_mean", "update/loss"]
        assert line["step"] == 1 and line["rollout/reward_mean"] == 0.5 and line["update/loss"] is None
        recorder.record(2, {"update/loss": float("-inf")})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2] and lines(tmp_path / "metrics.jsonl")[1]["update/loss"] is None
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 1, "prompt": f"prompt {n}", "response": "answer", "reward": 0.5, "key": f"key {n}"} for n in range(2)
    ]


def test_samples_may_hold_anything(tmp_path: Path) -> None:
    hostile = "</script>\n\u2028\ud800\x00|`| \u202e"
    with opened(tmp_path) as recorder:
        recorder.record(1, {}, {}, [Sample(hostile, hostile, float("nan"), None)])
    (line,) = lines(tmp_path / "samples.jsonl")
    assert line["response"] == hostile and line["reward"] is None and line["key"] is None
    assert len(read_back(tmp_path).Tensors("samples/answers")) == 1


def test_tensorboard_reads_everything_back(tmp_path: Path) -> None:
    with opened(tmp_path, histogram_interval=2, samples=1) as recorder:
        for step in (1, 2, 3, 4):
            values = {"rollout/rewards": [0.0, 0.0, 1.0, float("nan")], "update/w": [1.0] * 5, "update/none": []}
            recorder.record(step, {"rollout/reward_mean": step / 10, "time/step": 1e300}, values, [sample(step)])
    found = read_back(tmp_path)
    assert scalars(found, "rollout/reward_mean") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    rewards = found.Histograms("rollout/rewards")
    assert [event.step for event in rewards] == [2, 4]
    counted = rewards[0].histogram_value
    assert (counted.min, counted.max, counted.num, counted.sum) == (0, 1, 3, 1)
    assert sum(counted.bucket) == 3 and counted.bucket[0] == 2 and counted.bucket[-1] == 1
    assert found.Histograms("update/w")[0].histogram_value.bucket == [5]
    assert set(found.Tags()["histograms"]) == {"rollout/rewards", "update/w"}
    (answer, *_) = found.Tensors("samples/answers")
    assert answer.step == 1
    shown = answer.tensor_proto.string_val[0].decode()
    assert "reward 0.5" in shown and "    prompt 1" in shown and "    answer" in shown
    settings = found.Tensors("run/settings")[0].tensor_proto.string_val[0].decode()
    assert "| flowrl.beta | `15.0` |" in settings and "raw / 'x'" in settings
    assert found.PluginTagToContent("text").keys() == {"samples/answers", "run/settings"}
    hyper = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"flowrl.beta" in hyper and b"prompts.limit" in hyper


def test_settings_say_what_is_written(tmp_path: Path) -> None:
    with opened(tmp_path, tensorboard=False, samples=0) as recorder:
        recorder.record(1, {"a/b": 1.0}, {"a/c": [1.0]}, [sample(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_steps_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path, histogram_interval=1) as recorder:
        for step in range(1, 7):
            recorder.record(step, {"a/b": float(step)}, {"a/c": [float(step)]}, [sample(step)])
    with opened(tmp_path, resume_step=3, histogram_interval=1) as recorder:
        assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "samples.jsonl") == [1, 2, 3]
        assert [step for step, _ in scalars(read_back(tmp_path), "a/b")] == [1, 2, 3]
        for step in range(4, 6):
            recorder.record(step, {"a/b": 10.0 * step}, {"a/c": [float(step)]}, [sample(step)])
    assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "samples.jsonl") == [1, 2, 3, 4, 5]
    found = read_back(tmp_path)
    assert scalars(found, "a/b") == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert [event.step for event in found.Histograms("a/c")] == [1, 2, 3, 4, 5]
    assert [event.step for event in found.Tensors("samples/answers")] == [1, 2, 3, 4, 5]


def test_the_newest_event_file_is_read_last_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, now in enumerate((2e9, 2e9, 1e9)):  # twice in a second, then a clock that was set back
        monkeypatch.setattr(tensorboard.time, "time", lambda now=now: now)
        with opened(tmp_path) as recorder:
            recorder.record(1, {"a/b": float(value)})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert not any(path.name.startswith(".") for path in (tmp_path / "tensorboard").iterdir())
    assert scalars(read_back(tmp_path), "a/b") == [(1, 2)]


def test_a_start_that_came_to_nothing_is_not_seen_twice(tmp_path: Path) -> None:
    for _ in range(3):
        opened(tmp_path, resume_step=0).close()
    with opened(tmp_path, resume_step=0) as recorder:
        recorder.record(1, {"a/b": 1.0})
    assert len(read_back(tmp_path).Tensors("run/settings")) == 1


def test_event_files_that_were_cut_off_are_read_up_to_there(tmp_path: Path) -> None:
    with opened(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.record(step, {"a/b": float(step)})
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    file.with_name(f".{file.name}.partial-1").write_bytes(file.read_bytes())  # TensorBoard would read it
    with opened(tmp_path, resume_step=2) as recorder:
        recorder.record(3, {"a/b": 30.0})
    assert scalars(read_back(tmp_path), "a/b") == [(1, 1), (2, 2), (3, 30)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize("torn", ['{"step": 2, "a/b', '{"step": 2, "a/b": 1.0}', "not json\n", "[1]\n", '{"a": 1}\n'])
def test_what_is_no_whole_line_is_dropped(torn: str, tmp_path: Path) -> None:
    whole = '{"step": 1, "a/b": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + torn)
    with opened(tmp_path, resume_step=2):
        assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_what_is_to_be_kept_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":   1}\n')
    before = path.stat().st_ino
    opened(tmp_path, resume_step=1).close()
    assert path.stat().st_ino == before and path.read_text() == '{"step":   1}\n'


def test_a_step_is_not_recorded_again(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """The evaluation before the first step is made by every start until there is a checkpoint."""
    with opened(tmp_path) as recorder:
        recorder.record(0, {"evaluation/accuracy": 0.25})
        recorder.record(1, {"a/b": 1.0})
    said.clear()
    with opened(tmp_path, resume_step=0) as recorder:
        recorder.record(0, {"evaluation/accuracy": 0.5})
        recorder.record(1, {"a/b": 2.0})
        assert not [one for one in said.records if one.levelno >= logging.WARNING]
        recorder.record(1, {"a/b": 3.0})
        assert "step 1 is recorded already" in said.text
    assert [(line["step"], line.get("a/b")) for line in lines(tmp_path / "metrics.jsonl")] == [(0, None), (1, 2.0)]
    assert scalars(read_back(tmp_path), "evaluation/accuracy") == [(0, 0.25)]
    assert scalars(read_back(tmp_path), "a/b") == [(1, 2.0)]


def test_a_full_disk_is_said_once_and_recording_goes_on(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        return [one.getMessage() for one in said.records if one.levelno == logging.WARNING]

    with opened(tmp_path) as recorder:
        recorder.record(1, {"a/b": 1.0}, {}, [sample(1)])
        sizes = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
        with room_for(min(sizes.values()) + 10):  # a line begins, and does not end
            for step in (2, 3, 4):
                recorder.record(step, {"a/b": float(step)}, {}, [sample(step)])
        assert {path: path.stat().st_size for path in sizes} == sizes
        (warning,) = warnings()
        assert "metrics.jsonl" in warning and "File too large" in warning and "training goes on" in warning
        assert recorder.lost == 3
        recorder.record(5, {"a/b": 5.0}, {}, [sample(5)])
        assert "3 lines of metrics.jsonl were lost" in said.text
        with room_for(10):
            recorder.record(6, {"a/b": 6.0})
        assert len(warnings()) == 2 and recorder.lost == 4
    assert "lacks 4 lines" in warnings()[-1]
    assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "samples.jsonl") == [1, 5]
    assert scalars(read_back(tmp_path), "a/b") == [(1, 1), (5, 5)]


def test_another_reason_is_said_too(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = opened(tmp_path, tensorboard=False)
    reasons = iter(["Stale file handle"] * 2 + ["Permission denied"] * 2)

    def refusing(*_: Any, **__: Any) -> None:
        raise OSError(1, next(reasons))

    monkeypatch.setattr(growing, "open", refusing, raising=False)
    for step in range(1, 5):
        recorder.record(step, {"a/b": 1.0})
    assert [one.levelno for one in said.records] == [logging.WARNING] * 2
    assert "Stale file handle" in said.text and "Permission denied" in said.text


def test_no_room_for_the_head_of_the_event_file_delays_it(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    with room_for(0):
        recorder = opened(tmp_path)
        recorder.record(1, {"a/b": 1.0})
    assert "File too large" in said.text
    recorder.record(2, {"a/b": 2.0})
    assert scalars(read_back(tmp_path), "a/b") == [(2, 2)] and read_back(tmp_path).Tensors("run/settings")


def test_a_piece_that_could_not_be_taken_back_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = growing.GrowingFile(tmp_path / "file")
    file.append(b"one\n")
    genuine = builtins.open

    def half(*given: Any, **options: Any) -> Any:
        opened = genuine(*given, **options)

        class Half:
            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None:
                opened.close()

            def seek(self, *where: int) -> int:
                return opened.seek(*where)

            def write(self, piece: bytes) -> int:
                opened.write(bytes(piece[:2]))
                raise OSError(5, "Input/output error")

            def truncate(self, _: int) -> None:
                raise OSError(5, "Input/output error")

        return Half()

    monkeypatch.setattr(growing, "open", half, raising=False)
    with pytest.raises(OSError, match="Input/output"):
        file.append(b"two\n")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"one\ntw"
    file.append(b"three\n")
    assert (tmp_path / "file").read_bytes() == b"one\nthree\n"


_ENDLESS = """
import sys
from pathlib import Path
from megatron_flowrl.config import TrackingConfig
from megatron_flowrl.observe.recorder import Recorder, Sample
recorder = Recorder(Path(sys.argv[1]), TrackingConfig(), resume_step=0, hyper_parameters={})
step = 0
while True:
    step += 1
    recorder.record(step, {"a/b": float(step)}, {}, [Sample("p" * 5000, "r" * 5000, 1.0, None)])
    print(step, flush=True)
"""


def test_killed_at_any_instant_nothing_is_there_twice(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 20:
                break
        process.kill()
    with opened(tmp_path, resume_step=10) as recorder:
        for step in (11, 12):
            recorder.record(step, {"a/b": -1.0}, {}, [sample(step)])
    expected = list(range(1, 13))
    assert steps(tmp_path / "metrics.jsonl") == expected
    assert sorted(set(steps(tmp_path / "samples.jsonl"))) == expected
    assert [step for step, _ in scalars(read_back(tmp_path), "a/b")] == expected


def test_a_folder_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"tensorboard cannot be opened .*: File exists; make room, or give another"):
        opened(tmp_path)


def test_a_missing_package_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_flowrl.observe.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install tensorboard, or set tracking\.tensorboard=false"):
        opened(tmp_path)
