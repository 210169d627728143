"""What a run keeps in its folder: checkpoints to go on from, and the record of its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.checkpoint.lock import lock
from megatron_flowrl.checkpoint.reader import Resumed, resume, verified_manifest
from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.checkpoint.writer import CheckpointWriter
from megatron_flowrl.config import Config, SharedUserError, UserError, to_dict, to_yaml
from megatron_flowrl.observe.log import logger
from megatron_flowrl.observe.recorder import Recorder, Sample
from megatron_flowrl.platform.atomic import partials_in, remove, write_file
from megatron_flowrl.platform.distributed import together
from megatron_flowrl.training.session import Session

_AGAIN_SECONDS = 10.0
_NOTICE_SECONDS = 30.0  # for the last checkpoint where a cluster waits for the end
POSITION = "position"  # prompts, or rows, that were taken from the data


class RunFolder:
    """Where everything of a run is."""

    def __init__(self, config: Config) -> None:
        self.root = Path(config.run.folder)
        self.checkpoints = Path(config.checkpoint.save) if config.checkpoint.save else self.root / "checkpoints"
        self.critic_checkpoints = self.checkpoints.with_name(f"{self.checkpoints.name}_critic")
        self.rollouts = self.root / "rollouts"
        self.logs = self.root / "logs"
        self.config = self.root / "config.yaml"
        self._lock: IO[bytes] | None = None

    def prepare(self) -> None:
        """Make it, keep other runs out, and see that it can be written to. Raises UserError."""
        if self.root == Path():
            raise UserError("run.folder is empty; give the folder for what the run writes: run.folder=runs/NAME")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.root, "another run writes there; give another run.folder")
            for partial in [*partials_in(self.root), *partials_in(self.rollouts)]:
                remove(partial)
            write_file(self.root / ".writable", "")
            (self.root / ".writable").unlink()
        except OSError as error:
            raise UserError(
                f"run.folder = {str(self.root)!r} cannot be written: {error.strerror}; give another, or make room"
            ) from error


class Journal:
    """All ranks construct it together, before anything expensive: two runs in one folder are refused here.

    Rank 0 alone writes the record; every rank takes part in checkpoints.
    """

    def __init__(self, session: Session, *, critic: bool = False) -> None:
        self._session, self._config = session, session.config
        self.folder = RunFolder(session.config)
        with together():
            if session.world.rank == 0:
                self.folder.prepare()
        companions = session.folder.hugging_face
        self._writers = {"policy": CheckpointWriter(self.folder.checkpoints, self._config, companions)}
        if critic:
            self._writers["critic"] = CheckpointWriter(self.folder.critic_checkpoints, self._config, companions)
        self._states: dict[str, TrainingState] = {}
        self._recorder: Recorder | None = None
        self._saved, self._resumed, self._best = -1, -1, -math.inf

    def resume(self, policy: TrainingState, critic: TrainingState | None = None) -> Resumed:
        """Load the newest checkpoint that is good, or begin at step 0; records of later steps are forgotten."""
        self._states = {"policy": policy} | ({"critic": critic} if critic is not None else {})
        if critic is None:
            found = resume(policy, self.folder.checkpoints, self._config)
        else:
            step = self._newest_of_both()
            found = None if step is None else resume(policy, self.folder.checkpoints, self._config, [step])
            if step is not None:
                resume(critic, self.folder.critic_checkpoints, self._config, [step])
        place = found or Resumed(0, {POSITION: 0})
        self._saved = self._resumed = place.step if found is not None else -1
        with together():
            if self._session.world.rank == 0:
                self._open(place.step)
        return place

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] | None = None,
        samples: Sequence[Sample] = (),
    ) -> None:
        """Write down a step, on rank 0."""
        if self._recorder is not None:
            self._recorder.record(step, metrics, histograms or {}, samples)

    def save(self, step: int, position: int, *, last: bool, reward: float | None) -> None:
        """Save where it is time: every save_interval steps, after the last, and, with its reward, as the best yet.

        The last is on disk when this returns. Raises SharedUserError where it could not be written in
        checkpoint.last_save_seconds.
        """
        due = last or (step > 0 and step % self._config.checkpoint.save_interval == 0)
        best = self._save(step, position, due, reward)
        if last:
            self._insist(step, position, best, self._config.checkpoint.last_save_seconds)

    def _save(self, step: int, position: int, due: bool, reward: float | None) -> float | None:
        """Begin to, where it is due or the best; returns the reward that makes it that."""
        for writer in self._writers.values():
            writer.poll()
        is_best = [self._is_best(reward)]
        dist.broadcast_object_list(is_best, src=0)
        best = reward if is_best[0] else None
        if (due or is_best[0]) and step != self._saved:
            self._write(step, position, best)
            self._saved = step
        return best

    def _write(self, step: int, position: int, best: float | None) -> None:
        for name in sorted(self._writers):  # the critic's first: the policy's is what a start looks for
            self._writers[name].save(self._states[name], step, {POSITION: position}, best if name == "policy" else None)

    def _insist(self, step: int, position: int, best: float | None, patience: float) -> None:
        """With its last checkpoint a run loses what it learnt since the one before; there may soon be room for it."""
        began = time.monotonic()
        while True:
            for writer in self._writers.values():
                writer.wait()
            if self.saved >= step or self._resumed == step:
                return
            over = [time.monotonic() - began > patience]
            dist.broadcast_object_list(over, src=0)
            if over[0]:
                break
            logger.error("the run's last checkpoint is tried again for %.0f s; make room", patience)
            time.sleep(_AGAIN_SECONDS)
            self._write(step, position, best)
        raise SharedUserError(
            f"the checkpoint of step {step}, the last of this run, could not be written in {patience:.0f} s "
            f"(checkpoint.last_save_seconds); the newest is that of step {self.saved or max(self._resumed, 0)}: make "
            "room, and start again"
        )

    def end(self, step: int, position: int, reward: float | None = None) -> None:
        """The run ends after `step`, before its last: save what is not saved yet, and wait until it is written.

        Because it was asked to, or because there are no answers to go on with. Raises SharedUserError as `save` does.
        """
        steps = self._config.run.steps
        if step == 0:
            logger.warning("ends before its first step; there is nothing to save")
            return
        best = self._save(step, position, True, reward)
        self._insist(step, position, best, min(self._config.checkpoint.last_save_seconds, _NOTICE_SECONDS))
        logger.warning("ends after step %d of %d, which is saved; the same command goes on from there", step, steps)

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint that this start has finished; 0 where there is none."""
        return min(writer.last_saved or 0 for writer in self._writers.values())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish what is being written, also after an error that all ranks have in common; of another they may not."""
        if kind is None or issubclass(kind, SharedUserError):
            for writer in self._writers.values():
                writer.wait()
        if self._recorder is not None:
            self._recorder.close()

    def _newest_of_both(self) -> int | None:
        """The newest step of which policy and critic are whole; None where there is no checkpoint at all."""
        roots = [CheckpointFolder(self.folder.checkpoints), CheckpointFolder(self.folder.critic_checkpoints)]
        steps = [[set(root.steps()) for root in roots]]
        dist.broadcast_object_list(steps, src=0)
        for step in sorted(set.intersection(*steps[0]), reverse=True):
            try:
                for root in roots:
                    verified_manifest(root.path_of(step), checksums=self._config.checkpoint.verify_checksums)
            except SharedUserError as error:
                logger.warning("the checkpoints of step %d are passed over: %s", step, error)
            else:
                return step
        if any(steps[0]):
            raise SharedUserError(
                f"{roots[0].root} and {roots[1].root} have no step of which both checkpoints are whole; restore one, "
                "or give another run.folder to begin anew"
            )
        return None

    def _open(self, step: int) -> None:
        self._recorder = Recorder(
            self.folder.root, self._config.tracking, resume_step=step, hyper_parameters=to_dict(self._config)
        )
        try:
            write_file(self.folder.config, to_yaml(self._config))
        except OSError as error:
            raise UserError(f"{self.folder.config} cannot be written: {error.strerror}") from error

    def _is_best(self, reward: float | None) -> bool:
        if reward is None or not self._config.checkpoint.keep_best or self._session.world.rank != 0:
            return False
        known = CheckpointFolder(self.folder.checkpoints).best()
        self._best = max(self._best, -math.inf if known is None else known[1])
        if reward <= self._best:
            return False
        self._best = reward  # its checkpoint may be on its way for a while
        logger.info("the best evaluation so far: reward %.4f", reward)
        return True


__all__ = ["POSITION", "Journal", "RunFolder"]
