"""Where a step's answers come from: this run's own record of the step, another run's, or the sampler."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.order import PromptOrder, derived_seed
from megatron_flowrl.data.prompts import PromptSet
from megatron_flowrl.observe.log import logger
from megatron_flowrl.observe.timers import Timers
from megatron_flowrl.platform.distributed import broadcast_bytes, together
from megatron_flowrl.rollout.generation import Sampling
from megatron_flowrl.rollout.record import RecordFolder, RolloutRecord, decode
from megatron_flowrl.training.answers import Answers, Graded

_WAITING_SECONDS = 7200.0  # what the other ranks stand of waiting while rank 0 writes a record
_PHASES = ("weight_sync", "generate", "grade")


class Rollouts:
    """All ranks construct it together and call `take` together. `answers` is None where everything is replayed."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSet | None,
        answers: Answers | None,
        stop_token_ids: tuple[int, ...],
        vocab_size: int,
        own: Path,
    ) -> None:
        self._config, self._prompts, self._answers, self._stop = config, prompts, answers, stop_token_ids
        self._vocab_size = vocab_size
        self._own = RecordFolder(own)
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_WAITING_SECONDS))
        self._replay = RecordFolder(Path(config.rollout.replay)) if config.rollout.replay is not None else None
        self._source = _source(config, prompts, stop_token_ids)
        self._resampled = False
        self._order = None
        if prompts is not None:
            self._order = PromptOrder(len(prompts.prompts), config.seed, config.prompts.shuffle)

    def take(self, step: int, position: int, timed: Timers) -> RolloutRecord:
        """The rollout of a step, the same on every rank; what was sampled is on disk before this returns.

        `position` is the number of prompts that the steps before have taken. Raises SharedUserError where a record is
        asked for (rollout.replay) that is not there, not whole, or of another model's tokens.
        """
        content: bytes | None = None
        with together():
            if dist.get_rank() == 0:
                content = self._recorded(step, position)
        content = broadcast_bytes(content, self._group)
        if content is None:
            content = broadcast_bytes(self._sampled(step, position, timed), self._group)
        assert content is not None
        return decode(content, f"the record of step {step}")

    def prune(self, consumed: int) -> None:
        """Delete what rollout.keep_records says, of steps up to the checkpoint's."""
        keep = self._config.rollout.keep_records
        if keep is not None and self._replay is None and dist.get_rank() == 0:
            try:
                self._own.prune(keep, consumed)
            except OSError as error:
                logger.warning("old records of rollouts could not be deleted: %s", error)

    def _recorded(self, step: int, position: int) -> bytes | None:
        if self._replay is not None:
            content = self._replay.read(step)
            if content is None:
                raise UserError(_lacks(self._replay, step))
            path = self._replay.path_of(step)
            decode(content, str(path)).check_tokens(self._vocab_size, str(path))
            return content
        content = self._own.read(step)
        if content is None or self._resampled:  # after a step of new answers the weights are others
            return None
        path = self._own.path_of(step)
        try:
            record = decode(content, str(path))
        except UserError as error:
            logger.warning("%s; it is sampled again", error)
            return None
        if (record.source, record.position) != (self._source, position):
            logger.warning("%s was made with other prompts or settings; step %d is sampled again", path, step)
            return None
        logger.info("step %d is trained on what was sampled before: %s", step, path)
        return content

    def _sampled(self, step: int, position: int, timed: Timers) -> bytes | None:
        """On rank 0 the record's bytes; None on the others."""
        if self._answers is None or self._prompts is None or self._order is None:
            raise RuntimeError("there is no sampler")
        numbers = self._order.take(position, self._config.run.prompts_per_step)
        generation = self._config.generation
        self._resampled = True
        sampling = Sampling(
            max_tokens=generation.max_tokens,
            temperature=self._config.log_prob.temperature,
            stop_token_ids=self._stop,
            seed=derived_seed(self._config.seed, step) if generation.seeded else None,
        )
        prompts = [self._prompts.prompts[number] for number in numbers]
        graded = self._answers.sample(prompts, sampling, generation.n, str(step - 1), timed, f"rollout {step}")
        if dist.get_rank() != 0:
            return None
        seconds = {name: value for name, value in timed.seconds().items() if name in _PHASES}
        record = _record(graded, numbers, step, position, self._source, seconds)
        content = record.encode()
        try:
            self._own.write(step, content)
        except UserError as error:  # training goes on: only a restart would have needed it
            logger.error("%s", error)
        return content


def check_replay(config: Config, steps: range) -> None:
    """Refuse to begin where rollout.replay lacks one of the steps. All ranks call it together."""
    with together():
        if config.rollout.replay is not None and dist.get_rank() == 0:
            folder = RecordFolder(Path(config.rollout.replay))
            missing = sorted({*steps} - {*folder.steps()})
            if missing:
                raise UserError(_lacks(folder, missing[0]))


def _lacks(folder: RecordFolder, step: int) -> str:
    there = folder.steps()
    span = f"there are those of steps {there[0]} to {there[-1]}" if there else "there is none"
    return (
        f"rollout.replay = {str(folder.root)!r} has no record of step {step} ({span}); lower run.steps, or give "
        "another folder"
    )


def _record(
    graded: Sequence[Graded], numbers: Sequence[int], step: int, position: int, source: str, seconds: dict[str, float]
) -> RolloutRecord:
    answers = [one.answer for one in graded]
    return RolloutRecord(
        step=step,
        position=position,
        source=source,
        prompt_numbers=tuple(numbers[answer.prompt_index] for answer in answers),
        sequences=tuple(TokenSequence(one.prompt.tokens, one.answer.token_ids) for one in graded),
        groups=tuple(answer.prompt_index for answer in answers),
        rewards=tuple(one.grade.score for one in graded),
        log_probs=torch.tensor([value for answer in answers for value in answer.log_probs], dtype=torch.float32),
        finish_reasons=tuple(answer.finish_reason for answer in answers),
        keys=tuple(one.grade.key for one in graded),
        problems=tuple(one.grade.problem for one in graded),
        weight_versions=tuple(answer.weight_versions for answer in answers),
        seconds=seconds,
    )


def _source(config: Config, prompts: PromptSet | None, stop_token_ids: tuple[int, ...]) -> str:
    """A digest of what a record depends on beside chance: of the answers, their rewards, and what makes the weights."""
    generation = config.generation
    about = (
        prompts.fingerprint if prompts is not None else "",
        config.seed,
        config.prompts.shuffle,
        config.run.prompts_per_step,
        generation.n,
        generation.max_tokens,
        config.log_prob.temperature,
        config.reward.grader,
        config.reward.binary,
        config.reward.correct_from,
        config.reward.failed_score,
        stop_token_ids,
        config.model.path,
        config.run.prompts_per_mini_batch,
        config.objective,
        config.flowrl,
        config.log_z,
        config.policy_gradient,
        config.critic,
        config.sampler_correction,
        config.optimizer,
        config.reference,
    )
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


__all__ = ["Rollouts", "check_replay"]
