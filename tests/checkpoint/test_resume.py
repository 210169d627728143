"""Never lose, never lie: what a start does with damaged checkpoints, and a save without room."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_flowrl.checkpoint import reader, writer
from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.checkpoint.load import global_parameters, load_to_host
from megatron_flowrl.checkpoint.sources import CheckpointSource
from megatron_flowrl.config import SharedUserError
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform import cuda_stand_in, current_platform
from megatron_flowrl.platform.distributed import World, destroy_process_groups
from tests.distributed.checkpoint_worker import Run, Training
from tests.tiny_models import save_model


@pytest.fixture(scope="module", autouse=True)
def process_as_it_was() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
        destroy_process_groups()
        cuda_stand_in.uninstall()
        current_platform.cache_clear()


@pytest.fixture(autouse=True)
def no_groups_are_left() -> Iterator[None]:
    destroy_process_groups()
    yield
    destroy_process_groups()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model("qwen2", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def saved(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """A run's folder with checkpoints of steps 1, 2 and 3, and the weights of each."""
    root = tmp_path_factory.mktemp("saved") / "run"
    training = Training(_run(model, save=str(root), settings={"checkpoint.keep_last": 3}), World())
    weights = {}
    for step in (1, 2, 3):
        training.step()
        training.save()
        weights[step] = training.weights()
    training.wait()
    destroy_process_groups()
    return root, weights


@pytest.fixture
def root(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What has been logged since the training was set up."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    monkeypatch.setattr("tests.distributed.checkpoint_worker.configure_logging", lambda *_: None)
    monkeypatch.setattr(logger, "handlers", [Keep()])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    return lambda: "\n".join(records)


def _run(model: str, **more: Any) -> Run:
    return Run("run", model, until=0, **more)


def _resume(model: str, root: Path, **more: Any) -> Training:
    return Training(_run(model, resume=str(root), **more), World())


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped bit": ("*.distcp", _flip),
    "truncated": ("*.distcp", _truncate),
    "missing shard": ("*.distcp", Path.unlink),
    "flipped bit in the metadata": (".metadata", _flip),
    "missing common file": ("common.pt", Path.unlink),
    "missing manifest": ("manifest.json", Path.unlink),
    "truncated manifest": ("manifest.json", _truncate),
    "missing configuration": ("hugging_face/config.json", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_used(
    model: str, saved: Any, root: Path, said: Callable[[], str], damage: str
) -> None:
    pattern, change = DAMAGES[damage]
    path = max((root / "step_00000003").glob(pattern))
    change(path)
    training = _resume(model, root)
    assert training.resumed is not None and training.resumed.step == 2
    assert all(torch.equal(value, saved[1][2][name]) for name, value in training.weights().items())
    assert f"checkpoint {root / 'step_00000003'} is passed over" in said()
    assert CheckpointFolder(root).steps() == [1, 2] and CheckpointFolder(root).latest() == 2
    assert (root / "damaged_step_00000003").is_dir() and "damaged checkpoint is now" in said()
    assert path.name in said()
    assert "going on from step 2" in said()


def test_a_latest_that_was_not_moved_loses_nothing(model: str, root: Path) -> None:
    """The run was cut off between giving the checkpoint its name and pointing to it."""
    (root / "latest").write_text("step_00000002\n")
    training = _resume(model, root)
    assert training.resumed is not None and training.resumed.step == 3


def test_nothing_there_is_a_fresh_start(model: str, tmp_path: Path) -> None:
    assert _resume(model, tmp_path / "nowhere").resumed is None


def test_nothing_good_is_no_fresh_start(model: str, root: Path) -> None:
    for step in (1, 2, 3):
        _flip(root / f"step_0000000{step}" / "__0_0.distcp")
    with pytest.raises(SharedUserError) as caught:
        _resume(model, root)
    assert all(f"step_0000000{step}/__0_0.distcp is damaged" in str(caught.value) for step in (1, 2, 3))
    assert "restore one, or give another checkpoint.save to begin anew" in str(caught.value)


def test_without_checksums_only_sizes_are_compared(model: str, root: Path) -> None:
    _truncate(root / "step_00000003" / "__0_0.distcp")
    training = _resume(model, root, settings={"checkpoint.verify_checksums": False})
    assert training.resumed is not None and training.resumed.step == 2


def test_another_architecture_is_refused(root: Path, tmp_path: Path) -> None:
    other = save_model("qwen3", tmp_path / "other")
    with pytest.raises(SharedUserError, match="family is qwen2 in the checkpoint and qwen3 in the model"):
        _resume(str(other), root)


def test_quantised_weights_are_read_unquantised(model: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is where the optimizer begins; with values that FP8 has rounded, small updates would be lost."""
    places: set[int] = set()
    load = reader.dist_checkpointing.load

    def loads(sharded: dict[str, Any], path: str) -> Any:
        places.update(v.data.data_ptr() for v in nested_values(sharded["model"]) if isinstance(v, ShardedTensor))
        return load(sharded, path)

    def is_norm(tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.dim() == 1

    monkeypatch.setattr(reader.dist_checkpointing, "load", loads)
    monkeypatch.setattr("megatron.core.fp8_utils.is_float8tensor", is_norm)  # as if norms were quantised
    monkeypatch.setattr("megatron.core.fp8_utils.dequantize_fp8_tensor", torch.clone)
    (module,) = _resume(model, root).state.model.modules
    assert module.embedding.word_embeddings.weight.data_ptr() in places  # read where it lies
    assert module.decoder.final_layernorm.weight.data_ptr() not in places


def test_weights_alone_are_not_gone_on_from_unless_asked(model: str, tmp_path: Path, said: Callable[[], str]) -> None:
    root = tmp_path / "weights"
    training = Training(_run(model, save=str(root)), World())
    assert training.writer is not None
    training.writer.save(replace(training.state, optimizer=None, schedule=None), 0, {})
    training.writer.wait()
    destroy_process_groups()
    with pytest.raises(
        SharedUserError,
        match="has no optimizer state and no place in the learning rate's schedule, only model: going on from it",
    ):
        _resume(model, root)
    destroy_process_groups()
    training = _resume(model, root, settings={"checkpoint.load_optim": False})
    assert training.resumed is not None and training.resumed.step == 0
    assert "the optimizer starts fresh at step 0: checkpoint.load_optim is false" in said()


def test_a_fresh_optimizer_keeps_the_place_in_the_schedule(model: str, root: Path) -> None:
    training = _resume(model, root, settings={"checkpoint.load_optim": False})
    assert training.schedule.num_steps == 3
    states = training.optimizer.megatron.chained_optimizers[0].optimizer.state.values()
    assert all(not state["exp_avg"].any() and state["step"] == 0 for state in states)


@pytest.mark.parametrize("replicated", [False, True])
def test_a_fresh_optimizer_begins_from_the_weights_that_were_loaded(
    model: str, tmp_path: Path, replicated: bool
) -> None:
    """In bf16 it has fp32 main weights of its own, which a step would copy over the model's."""
    settings = {"precision.dtype": "bfloat16", "ddp.use_distributed_optimizer": not replicated}
    training = Training(_run(model, save=str(tmp_path / "run"), settings=settings), World())
    training.step()
    training.save()
    weights = training.weights()
    training.wait()
    destroy_process_groups()
    fresh = settings | {"checkpoint.load_optim": False, "optimizer.lr": 0.0}
    training = _resume(model, tmp_path / "run", settings=fresh)
    training.step()
    assert all(torch.equal(value, weights[name]) for name, value in training.weights().items())


def test_another_dtype_is_not_gone_on_with_unless_asked(model: str, root: Path) -> None:
    with pytest.raises(SharedUserError, match=r"was trained with precision\.dtype = float32, not bfloat16"):
        _resume(model, root, settings={"precision.dtype": "bfloat16"})
    destroy_process_groups()
    fresh = {"precision.dtype": "bfloat16", "checkpoint.load_optim": False}
    assert _resume(model, root, settings=fresh).resumed is not None


def test_weights_for_the_host_come_from_a_checkpoint_and_leave_the_model_alone(
    model: str, saved: Any, root: Path
) -> None:
    """Also where updated weights are gathered lazily: the hooks for that are off while others read."""
    overlap = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
    training = _resume(model, root, settings=overlap)
    training.step()
    before = training.weights()
    source = CheckpointSource(root / "step_00000002", checksums=True)
    hosted = load_to_host(training.state.model, source, pin_memory=False)
    after = training.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    names = [name for name, _ in global_parameters(training.state.model.modules[0])]
    found = dict(zip(names, hosted, strict=True))
    assert torch.equal(found["decoder.final_layernorm.weight"], saved[1][2]["model.norm.weight"])
    assert torch.equal(found["embedding.word_embeddings.weight"][:299], saved[1][2]["model.embed_tokens.weight"])
    training.step()


def test_two_runs_do_not_share_a_folder(training: Training, model: str, tmp_path: Path) -> None:
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    assert subprocess.run(other, check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_a_folder_in_use_is_refused(model: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(root / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(SharedUserError, match="is in use: another run saves its checkpoints there; give another"):
            Training(_run(model, save=str(root)), World())
        other.kill()


def test_a_failing_prune_does_not_fail_the_save(
    training: Training, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(CheckpointFolder, "prune", busy)
    training.save()
    training.wait()
    assert training.writer.last_saved == 2
    assert "could not tidy up: [Errno 16] Device or resource busy" in said()


def test_records_that_were_cut_off_are_made_again(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "write_file", lambda path, _: path.write_text("{"))
    training.save()
    training.wait()
    assert training.writer.last_saved == 2
    assert reader.verified_manifest(tmp_path / "run" / "step_00000002", checksums=True).step == 2


def test_a_missing_log_z_is_not_begun_anew_unless_asked(model: str, root: Path) -> None:
    with pytest.raises(
        SharedUserError,
        match="has no log Z head, only model, optimizer, schedule: going on from it would begin with a fresh",
    ):
        _resume(model, root, log_z=True)
    destroy_process_groups()
    training = _resume(model, root, log_z=True, settings={"checkpoint.load_optim": False})
    assert training.resumed is not None and training.resumed.step == 3


def test_settings_of_the_configuration_hold_after_a_restart(model: str, root: Path, said: Callable[[], str]) -> None:
    training = _resume(model, root, settings={"optimizer.lr": 0.01, "optimizer.adam_beta2": 0.5})
    training.step()
    (group, *_) = training.optimizer.megatron.param_groups
    assert group["lr"] == 0.01 and group["betas"] == (0.9, 0.5)
    assert "optimizer.lr 0.001 -> 0.01" in said() and "optimizer.adam_beta2 0.999 -> 0.5" in said()


def test_another_megatron_is_named_where_loading_fails(model: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = root / "step_00000003" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["versions"]["megatron_core"] = "0.99.0"
    manifest.write_text(json.dumps(content))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("something of the future")

    monkeypatch.setattr(reader.dist_checkpointing, "load", fail)
    with pytest.raises(
        Exception,
        match=r"cannot be loaded, though its files are what was written: KeyError: .*future.*core 0\.99\.0 then, 0\.",
    ):
        _resume(model, root)


def _save_in_trouble(training: Training, said: Callable[[], str], reason: str) -> None:
    """The save of step 2 fails and is said; training goes on, and the next save is good."""
    assert training.writer is not None
    training.save()
    training.writer.wait()
    assert f"the checkpoint of step {training.done} could not be written" in said()
    assert reason in said() and "the last good one is of step 1" in said()
    assert training.writer.last_saved == 1


@pytest.fixture
def training(model: str, tmp_path: Path, said: Callable[[], str]) -> Training:
    """With a checkpoint of step 1, and step 2 made."""
    training = Training(_run(model, save=str(tmp_path / "run")), World())
    training.step()
    training.save()
    training.step()
    training.wait()
    return training


def _only_good_checkpoints(training: Training, root: Path, steps: list[int]) -> None:
    assert CheckpointFolder(root).steps() == steps and CheckpointFolder(root).latest() == steps[-1]
    names = [path.name for path in root.iterdir() if path.name != ".lock"]
    assert sorted(names) == ["latest", *(f"step_{step:08d}" for step in steps)]


def test_no_room_is_seen_before_writing(
    training: Training, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
        _save_in_trouble(training, said, "GB free and the checkpoint takes 0.02 GB: make room, or lower")
        _only_good_checkpoints(training, tmp_path / "run", [1])
    training.save()
    training.wait()
    _only_good_checkpoints(training, tmp_path / "run", [1, 2])


def test_a_disk_that_fills_up_while_writing(
    training: Training, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played by a limit on the size of files, which the writers inherit."""
    monkeypatch.setattr(writer, "_reserve", lambda *_: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        _save_in_trouble(training, said, "the disk did not take all bytes: is it full, or a quota used up?")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    _only_good_checkpoints(training, tmp_path / "run", [1])
    training.step()
    training.save()
    training.wait()
    _only_good_checkpoints(training, tmp_path / "run", [1, 3])


def test_a_disk_that_fills_up_at_the_manifest(
    training: Training, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_manifest", full)
        _save_in_trouble(training, said, "No space left on device")
    _only_good_checkpoints(training, tmp_path / "run", [1])


def test_a_writer_that_is_killed(
    training: Training, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_and_record", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        _save_in_trouble(training, said, "a writer process ended without a word: killed, or out of memory")
    _only_good_checkpoints(training, tmp_path / "run", [1])


def test_a_writer_that_hangs(
    training: Training, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert training.writer is not None
    limited = replace(training.config.checkpoint, write_timeout_seconds=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_and_record", lambda *_: time.sleep(1000))
        patch.setattr(training.writer, "_config", replace(training.config, checkpoint=limited))
        _save_in_trouble(training, said, "longer than checkpoint.write_timeout_seconds = 1: look at the disk")
    _only_good_checkpoints(training, tmp_path / "run", [1])
    training.save()
    training.wait()
    _only_good_checkpoints(training, tmp_path / "run", [1, 2])


def test_a_writer_that_does_not_even_end(
    training: Training, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a disk: it is left alone, and what it says in the end disturbs nobody."""
    assert training.writer is not None
    limited = replace(training.config.checkpoint, write_timeout_seconds=0.5)
    write, left = writer._write_and_record, []
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_END_SECONDS", 0.5)
        patch.setattr(writer, "_write_and_record", lambda *given: (time.sleep(4), write(*given)))
        patch.setattr("multiprocessing.process.BaseProcess.kill", lambda process: left.append(process))
        patch.setattr(training.writer, "_config", replace(training.config, checkpoint=limited))
        _save_in_trouble(training, said, "look at the disk, or raise it; a writer does not end")
    assert CheckpointFolder(tmp_path / "run").steps() == [1]
    left[0].join()  # it has written all, and reported it
    training.save()
    training.wait()
    assert CheckpointFolder(tmp_path / "run").steps() == [1, 2] and training.writer.last_saved == 2


def test_what_an_earlier_run_left_half_written_is_swept(model: str, root: Path) -> None:
    (root / ".step_00000004.partial-dead").mkdir()
    (root / ".latest.partial-1").touch()
    training = _resume(model, root, save=str(root))
    assert training.resumed is not None and training.resumed.step == 3
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == [".lock"]


def test_a_folder_that_cannot_be_written_is_refused_before_training(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SharedUserError, match=r"checkpoint\.save = .*file.* cannot be written"):
        Training(_run(model, save=str(tmp_path / "file")), World())
