"""Answers to prompts, graded while others are still being sampled."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_flowrl.config import SharedUserError, UserError
from megatron_flowrl.data.prompts import Prompt
from megatron_flowrl.data.tokenizer import Tokenizer
from megatron_flowrl.evaluation.summary import GradedAnswer
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.observe.log import progress
from megatron_flowrl.platform.distributed import together
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import GraderPool
from megatron_flowrl.rollout.generation import Answer, Sampling
from megatron_flowrl.rollout.sampler import Sampler, SyncReport
from megatron_flowrl.training.session import Session
from megatron_flowrl.training.trainer import Timed

_GRADING_SECONDS = 7200.0  # what the other ranks stand of waiting for grades
_NUM_SOLUTIONS = "num_solutions"  # column of the data that says how many right answers a prompt has


@dataclass(frozen=True)
class Graded:
    """An answer and what it is worth."""

    answer: Answer
    prompt: Prompt
    text: str
    grade: Grade

    def counted(self) -> GradedAnswer:
        """What is counted of it."""
        return GradedAnswer(
            self.answer.prompt_index,
            self.grade.score,
            len(self.answer.token_ids),
            self.answer.finish_reason == "length",
            self.grade.key,
            self.grade.problem is not None,
            num_solutions(self.prompt),
        )


def num_solutions(prompt: Prompt) -> int | None:
    """How many right answers a prompt has, where its row says so."""
    count = prompt.row.get(_NUM_SOLUTIONS)
    return count if type(count) is int and count > 0 else None


class Answers:
    """Sampler and graders; all ranks construct it together, rank 0 alone has the grades. Close it."""

    def __init__(
        self,
        session: Session,
        model: ParallelModel,
        tokenizer: Callable[[], Tokenizer],
        logs: Path,
        on_wait: Callable[[], bool],
    ) -> None:
        config = session.config
        self._config, self._world, self._tokenizer = config, session.world, tokenizer
        self._version = ""
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_GRADING_SECONDS))
        self._pool: GraderPool | None = None
        with together():
            if session.world.rank == 0:
                self._pool = GraderPool(config.reward)
        try:
            self._sampler = Sampler(config, session.world, model, session.folder.hugging_face, logs, on_wait)
        except BaseException:
            if self._pool is not None:
                self._pool.close()
            raise
        self.last_sync: SyncReport | None = None

    def start(self) -> None:
        """Have the servers ready."""
        self._sampler.start()

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int,
        version: str,
        timed: Timed,
        what: str,
    ) -> list[Graded]:
        """n answers to each prompt by the weights as they are now, whose name is `version`; prompt by prompt.

        All ranks call it together; the others than rank 0 get an empty list. Raises SharedUserError where nothing can
        be sampled or graded any more, and Interrupted where the run is to end.
        """
        if version != self._version:
            with timed("weight_sync"):
                self.last_sync = self._sampler.sync(version)
            self._version = version
        futures: dict[tuple[int, int], tuple[str, Future[Grade]]] = {}
        decode = self._tokenizer().decode if self._pool is not None else None

        def grade(answer: Answer) -> None:
            assert self._pool is not None and decode is not None
            prompt = prompts[answer.prompt_index]
            text = decode(list(answer.token_ids))
            item = Item(text, prompt.ground_truth, prompt.text, prompt.row, answer.finish_reason)
            futures[answer.prompt_index, answer.sample_index] = text, self._pool.submit(item)
            advance()

        with (
            timed("generate"),
            progress(self._config.logging, self._world.rank, len(prompts) * n, what) as advance,
        ):
            answers = self._sampler.generate([prompt.tokens for prompt in prompts], sampling, n, grade)
        with timed("grade"):  # what is left of it
            graded = []
            problems: list[tuple[str, ...]] = [()]
            try:
                for answer in answers:
                    text, future = futures[answer.prompt_index, answer.sample_index]
                    graded.append(Graded(answer, prompts[answer.prompt_index], text, future.result()))
            except UserError as error:  # rank 0 grades, and the others have to be told
                problems = [error.problems]
            dist.broadcast_object_list(problems, src=0, group=self._group)
            if problems[0]:
                raise SharedUserError(*problems[0])
        return graded

    def rest(self) -> None:
        """Leave the GPUs to the trainer, where they are shared, until the next weights come."""
        self._sampler.sleep()

    def close(self) -> None:
        """End the servers and the graders."""
        self._sampler.close()
        if self._pool is not None:
            self._pool.close()
