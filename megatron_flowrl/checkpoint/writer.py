"""Save checkpoints while training goes on.

Megatron forks a writer on every rank, whose memory is a snapshot of this moment, and training goes on at once; on a
GPU it first copies the tensors to host memory. What is written has a hidden name until everything, the manifest with
its checksums last, is on disk; only then does the folder get its name, and `latest` after it. So a run that is killed
at any instant finds the checkpoints it had, or one more.
"""

from __future__ import annotations

import inspect
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_flowrl.checkpoint.companions import read_companions, write_companions
from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.checkpoint.locate import COMPANIONS
from megatron_flowrl.checkpoint.lock import lock
from megatron_flowrl.checkpoint.manifest import (
    FileRecord,
    Manifest,
    describe_architecture,
    record_file,
    record_files,
    write_manifest,
)
from megatron_flowrl.checkpoint.processes import ResultQueue, die_with, use_result_queue
from megatron_flowrl.checkpoint.state import TrainingState, bytes_to_write
from megatron_flowrl.config import Config, SharedUserError, UserError, to_dict
from megatron_flowrl.model.build import weights_in_place
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.atomic import partial_path, remove, write_file
from megatron_flowrl.platform.distributed import layout_of, together
from megatron_flowrl.platform.libraries import versions

_COMMON_FILE = "common.pt"
# From 0.19 on the default is a library of NVIDIA's beside Megatron-Core.
_MEGATRONS_OWN_WRITER = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)
_BYTES_A_TENSOR = 1024  # of metadata
_LOOK_SECONDS = 0.05
_END_SECONDS = 20.0
_HEADROOM = 2**24  # bytes for what is written beside tensors


@dataclass(frozen=True)
class _Save:
    step: int
    partial: Path
    started: float
    best: float | None

    @property
    def reserve(self) -> Path:
        """Room kept for what rank 0 writes at the end, while the other ranks wait for it inside Megatron."""
        return self.partial.with_name(f"{self.partial.name}.reserve")


class CheckpointWriter:
    """Saves the states of one run. Every method is called by all ranks together.

    A save that fails is logged as an error and leaves no trace, and training may go on: `last_saved` is the step of
    the newest checkpoint that this run has finished.
    """

    def __init__(self, root: Path, config: Config, companions: Path) -> None:
        self._folder = CheckpointFolder(root)
        self._config = config
        self._companions: dict[str, bytes] = {}
        self._lock: IO[bytes] | None = None
        self._queue = AsyncCallsQueue(persistent=False)
        self._pending: _Save | None = None
        self._trouble: str | None = None  # why its writers were ended
        self._validated = False
        self.last_saved: int | None = None
        self._results = ResultQueue()
        with together(), self._disk():
            if dist.get_rank() == 0:
                self._companions = read_companions(companions)
                root.mkdir(parents=True, exist_ok=True)
                self._lock = lock(root, "another run saves its checkpoints there; give another")
                self._folder.sweep()

    def save(self, state: TrainingState, step: int, progress: Mapping[str, int], best: float | None = None) -> None:
        """Begin to save; the state may change as soon as this returns. Waits for a save that is still under way.

        `best`: the reward that makes it the best so far, to be named as that. Without `checkpoint.async_save` it
        returns when the save is on disk or has failed.
        """
        if self._pending is not None:
            logger.info("step %d waits for the checkpoint of step %d", step, self._pending.step)
            self.wait()
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token, src=0)
        begun = time.perf_counter()
        use_result_queue(self._results)
        try:
            with weights_in_place(state.model.chunks):
                sharded = state.sharded_state_dict()
                self._pending = _Save(step, partial_path(self._folder.path_of(step), token[0]), begun, best)
                self._begin(self._pending, sharded)
                self._schedule(self._pending, sharded, state, progress)
        except SharedUserError as error:
            self._give_up(step, _reason(error))
        if not self._config.checkpoint.async_save:
            self.wait()

    def poll(self) -> None:
        """Finish a save whose writers are done; cheap otherwise. To be called between steps."""
        self._finish()

    def wait(self) -> None:
        """Wait until the save under way, if any, is on disk or has failed.

        Where that takes longer than checkpoint.write_timeout_seconds, as on a disk that hangs, its writers are ended;
        one that does not even end is left alone.
        """
        since, asked = time.perf_counter(), False
        while True:
            self._finish()
            if self._pending is None:
                return
            late = self._late(time.perf_counter() - since)
            if late and not asked:
                asked = True
                self._trouble = (
                    "it took longer than checkpoint.write_timeout_seconds = "
                    f"{self._config.checkpoint.write_timeout_seconds:g}: look at the disk, or raise it"
                )
                for call in self._queue.async_calls:
                    if call.async_caller.process is not None:  # a rank may have nothing to write
                        call.async_caller.process.kill()
            elif late == 2:
                self._queue = AsyncCallsQueue(persistent=False)
                self._results = ResultQueue()  # into the old one it may yet say something
                self._give_up(self._pending.step, f"{self._trouble}; a writer does not end", clear=False)
                return
            time.sleep(_LOOK_SECONDS)

    def _late(self, waited: float) -> int:
        """1: the writers have to end; 2: they do not. The same on all ranks."""
        limit = self._config.checkpoint.write_timeout_seconds
        late = int(waited > limit) + int(waited > limit + _END_SECONDS)
        worst = torch.tensor(late, dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return int(worst)

    def _begin(self, pending: _Save, sharded: Mapping[str, Any]) -> None:
        needed = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(needed, bytes_to_write(sharded))
        with together(), self._disk():
            if dist.get_rank() == 0:
                headroom = _HEADROOM + _BYTES_A_TENSOR * sum(tensors for _, tensors in needed)
                total = headroom + sum(nbytes for nbytes, _ in needed)
                free = shutil.disk_usage(self._folder.root).free
                if free < total:
                    raise UserError(
                        f"{self._folder.root} has {free / 1e9:.2f} GB free and the checkpoint takes "
                        f"{total / 1e9:.2f} GB: make room, or lower checkpoint.keep_last"
                    )
                pending.partial.mkdir()
                _reserve(pending.reserve, headroom)

    def _schedule(
        self, pending: _Save, sharded: dict[str, Any], state: TrainingState, progress: Mapping[str, int]
    ) -> None:
        partial_folder = pending.partial
        for value in nested_values(sharded):
            if isinstance(value, ShardedTensor):
                value.data = _without_its_neighbours(value.data)
        request = dist_checkpointing.save(
            sharded,
            str(partial_folder),
            async_sharded_save=True,
            validate_access_integrity=not self._validated,  # the layout does not change within a run
            **_MEGATRONS_OWN_WRITER,
        )
        self._validated = True
        if request.async_fn is not None:
            write = partial(_write_and_record, request.async_fn, partial_folder, dist.get_rank(), os.getpid())
            request = request._replace(async_fn=write)
        manifest = partial(
            Manifest,
            step=pending.step,
            parts=state.parts,
            progress=dict(progress),
            architecture=describe_architecture(state.model.architecture),
            config=to_dict(self._config),
            layout=layout_of(),
            versions=versions(),
        )
        request.finalize_fns.insert(0, lambda: pending.reserve.unlink(missing_ok=True))
        request.add_finalize_fn(partial(self._commit, partial_folder, pending, manifest))
        self._queue.schedule_async_request(request)

    def _finish(self) -> None:
        if self._pending is None:
            return
        pending = self._pending
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=False):
                return
        except (CheckpointException, SharedUserError) as error:
            # Megatron and `together` raise on every rank; the reason is known to rank 0.
            self._give_up(pending.step, self._trouble or _reason(error))
            return
        self._pending, self.last_saved = None, pending.step
        if dist.get_rank() == 0:
            with _tolerating_errors():
                self._folder.prune(self._config.checkpoint.keep_last)
        logger.info(
            "checkpoint %s written in %.1f s", self._folder.path_of(pending.step), time.perf_counter() - pending.started
        )

    def _commit(self, partial_folder: Path, pending: _Save, manifest: Callable[..., Manifest]) -> None:
        """Runs on all ranks once all of them have written their files, and Megatron its own."""
        with together(), self._disk():
            if dist.get_rank() == 0:
                (partial_folder / COMPANIONS).mkdir()
                write_companions(self._companions, partial_folder / COMPANIONS)
                _write_common_file(partial_folder)
                write_manifest(
                    partial_folder, manifest(files=record_files(partial_folder, _take_records(partial_folder)))
                )
                self._folder.commit(partial_folder, pending.step)
                if pending.best is not None:
                    self._folder.point_to_best(pending.step, pending.best)

    def _give_up(self, step: int, reason: str, *, clear: bool = True) -> None:
        """`clear`: also what is there of it, now and not at the next start."""
        pending, self._pending, self._trouble = self._pending, None, None
        if dist.get_rank() == 0 and pending is not None and clear:
            with _tolerating_errors():
                pending.reserve.unlink(missing_ok=True)
                if pending.partial.exists():
                    remove(pending.partial)
        good = "none was written yet" if self.last_saved is None else f"the last good one is of step {self.last_saved}"
        logger.error("the checkpoint of step %d could not be written (%s); %s", step, reason, good)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Rank 0 alone is inside, and the others wait to hear of it: whatever goes wrong has to be said."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or _explained(" ".join(str(error).split()))
            raise UserError(
                f"checkpoint.save = {str(self._folder.root)!r} cannot be written: {reason or type(error).__name__}"
            ) from error


def _write_and_record(
    write: Callable[..., None], folder: Path, rank: int, parent: int, *args: Any, **kwargs: Any
) -> None:
    """In the writer's process: Megatron's writing, then the checksums of what this rank has written."""
    die_with(parent)
    write(*args, **kwargs)
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    records = {file.name: asdict(record_file(file)) for file in files}
    write_file(folder / _RECORDS.format(rank), json.dumps(records))


def _without_its_neighbours(tensor: Tensor) -> Tensor:
    """The same memory as a tensor whose storage is no larger than itself.

    Megatron copies a tensor on the CPU that is part of a larger storage, such as a buffer of all gradients or weights,
    before it writes it, since torch would write the whole storage. A forked writer has a snapshot: no copy is needed.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    if tensor.untyped_storage().size() == tensor.nbytes:
        return tensor
    return torch.from_numpy(tensor.detach().view(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


_RECORDS = ".records_{}.json"


def _take_records(folder: Path) -> dict[str, FileRecord]:
    """The checksums that the writers have left; a file without one is read again for it."""
    known: dict[str, FileRecord] = {}
    for path in folder.glob(_RECORDS.format("*")):
        with suppress(OSError, ValueError, TypeError):  # one that was cut off
            records = json.loads(path.read_text(encoding="utf-8"))
            known |= {name: FileRecord(**record) for name, record in records.items()}
        path.unlink()
    return known


def _reserve(path: Path, size: int) -> None:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _write_common_file(folder: Path) -> None:
    """Megatron-Core 0.19 keeps what is not a tensor inside the tensors' files, where 0.16 does not find it.

    Both read the older way.
    """
    if not (folder / _COMMON_FILE).exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / _COMMON_FILE)


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        return _explained(" ".join(str(first[0] if isinstance(first, tuple) else first).split()))
    return " ".join(str(error).split()) or type(error).__name__


def _explained(reason: str) -> str:
    if "results_queue should not be empty" in reason:
        return "a writer process ended without a word: killed, or out of memory"
    # All that torch says of a short write, and all that Megatron-Core 0.19 says of any error of the system.
    if ("inline_container" in reason and "unexpected pos" in reason) or "<class 'OSError'>" in reason:
        return "the disk did not take all bytes: is it full, or a quota used up?"
    return reason


@contextmanager
def _tolerating_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("could not tidy up: %s", error)
