"""A pool of grading processes: answers go in as they are finished, grades come out as futures.

A thread holds each process. It takes waiting items, sends them, and completes their futures as the grades come; the
caller never waits. One item costs at most reward.timeout_seconds, whatever it does: its process is then killed and
replaced, as one is that crashes, and the items that had been sent behind it go back to the head of the line.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from megatron_flowrl.config import RewardConfig, UserError
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rewards.frames import decode_grade, encode_item
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.process import Closing, GradingProcess, ProcessEnded, TimeLimit

TIME_LIMIT = "time limit"
"""The problem of an answer that was not graded in time."""

_STARTS = 3  # tries to start a process, one after another
_ITEMS_OF_A_PROCESS = 50_000  # then it is replaced, and what it has leaked is gone
# What is sent at once: fewer wake-ups of a thread whose interpreter is busy, where grading is quick.
_BATCH_ITEMS = 16
_BATCH_SECONDS = 0.02
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class _Job:
    item: Item
    future: Future[Grade]


class GraderPool:
    """Grades in `reward.workers` processes; a context manager. Every method may be called from any thread."""

    def __init__(self, settings: RewardConfig) -> None:
        """Returns when all processes have imported the grader.

        Raises UserError where it cannot be imported (see `find.make_grader`) or no process can be started.
        """
        self._settings = settings
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._underway: set[Future[Grade]] = set()
        self._ready, self._closed, self._broken = 0, False, ""
        self._item_seconds = 1.0
        self._graded, self._problems = 0, Counter[str]()
        self._closing, self._close = os.pipe()
        self._threads = [
            threading.Thread(target=self._hold_process, name=f"grader {number}", daemon=True)
            for number in range(settings.workers)
        ]
        try:
            for thread in self._threads:
                thread.start()
            with self._changed:
                self._changed.wait_for(lambda: self._broken or self._ready == settings.workers)
                if self._broken:
                    raise UserError(self._broken)
        except BaseException:
            self.close()
            raise

    @property
    def graded(self) -> int:
        """Items whose grade has come, those with a problem included."""
        with self._changed:
            return self._graded

    @property
    def problems(self) -> dict[str, int]:
        """How many could not be graded, by the kind of problem: its text up to the first colon."""
        with self._changed:
            return dict(self._problems)

    def submit(self, item: Item) -> Future[Grade]:
        """The grade to come. Returns at once.

        The future's result is a Grade, also where the item could not be graded (with `reward.failed_score`); it raises
        UserError where processes no longer start, and CancelledError where the pool is closed before. Raises
        UserError at once where that is known, and RuntimeError where the pool is closed.
        """
        job = _Job(item, Future())
        with self._changed:
            if self._broken:
                raise UserError(self._broken)
            if self._closed:
                raise RuntimeError("the pool of graders is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grade all, and wait; in the order of the items. Raises what `submit` and its futures raise."""
        return [future.result() for future in [self.submit(item) for item in items]]

    def close(self) -> None:
        """Kill the processes and all that they have started; futures that are not done raise CancelledError."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify_all()
        if not first:
            return
        os.write(self._close, b"x")
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        self._abandon(CancelledError)
        if threading.current_thread() not in self._threads:
            os.close(self._close)
            os.close(self._closing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _hold_process(self) -> None:
        process = None
        try:
            process = self._start()
            with self._changed:
                self._ready += 1
                self._changed.notify_all()
            while (batch := self._take()) is not None:
                if not process.idle():  # killed from outside, while it had nothing to do
                    process = self._restart(process)
                good = self._grade(process, batch)
                if not good or process.graded >= _ITEMS_OF_A_PROCESS:
                    process = self._restart(process)
        except Closing:
            pass
        except UserError as error:
            self._break(str(error))
        except Exception as error:  # none is expected; whoever waits for a grade must not wait for ever
            logger.exception("a thread of the pool of graders failed")
            self._break(f"grading failed: {type(error).__name__}: {error}")
        finally:
            if process is not None:
                process.end()

    def _restart(self, process: GradingProcess) -> GradingProcess:
        process.end()
        return self._start()

    def _start(self) -> GradingProcess:
        """A process that has imported the grader. Raises UserError or Closing."""
        for _ in range(_STARTS):
            process, reason = None, ""
            try:
                process = GradingProcess(self._settings, self._closing)
                process.wait_until_ready()
                return process
            except TimeLimit:
                reason = "it was not ready in time"
            except (ProcessEnded, OSError, ValueError) as error:
                reason = str(error)
            except BaseException:
                if process is not None:
                    process.end()
                raise
            if process is not None:
                process.end()
            logger.warning("a grading process did not start: %s", reason)
        raise UserError(
            f"reward.grader = {self._settings.grader!r}: {_STARTS} processes in a row did not start, the last one: "
            f"{reason}; what they have printed is above"
        )

    def _take(self) -> list[_Job] | None:
        """Wait for items, and take some; None where the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._broken or self._waiting)
            if self._closed or self._broken:
                return None
            share = min(len(self._waiting) // len(self._threads), int(_BATCH_SECONDS / self._item_seconds))
            batch: list[_Job] = []
            characters = 0
            while self._waiting and len(batch) < max(1, min(share, _BATCH_ITEMS)) and characters < _BATCH_CHARACTERS:
                job = self._waiting.popleft()
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    characters += len(job.item.response)
                    batch.append(job)
                    self._underway.add(job.future)
            return batch

    def _grade(self, process: GradingProcess, batch: list[_Job]) -> bool:
        """Grade a batch, or its head; returns whether the process is still good. Raises Closing."""
        sent, frames = [], []
        for job in batch:
            try:
                frames.append(encode_item(job.item))
                sent.append(job)
            except Exception as error:  # pickle runs the row's own code
                self._complete(job, Grade(0.0, problem=f"{type(error).__name__}: {error}"))
        process.send(b"".join(frames))
        for number, job in enumerate(sent):
            began, problem = time.monotonic(), ""
            try:
                grade = decode_grade(process.receive(self._settings.timeout_seconds))
            except TimeLimit:
                problem = TIME_LIMIT
            except (ProcessEnded, ValueError) as error:
                problem = f"crash: {error}"
            if problem:
                self._put_back(sent[number + 1 :])
                process.end()  # before the caller hears of it: what it was asked to grade has ended
                self._complete(job, Grade(0.0, problem=problem))
                return False
            process.graded += 1
            self._item_seconds += 0.1 * (max(time.monotonic() - began, 1e-6) - self._item_seconds)
            self._complete(job, grade)
        return True

    def _put_back(self, jobs: list[_Job]) -> None:
        with self._changed:
            jobs = [job for job in jobs if job.future in self._underway]
            self._underway.difference_update(job.future for job in jobs)
            self._waiting.extendleft(reversed(jobs))
            self._changed.notify_all()

    def _complete(self, job: _Job, grade: Grade) -> None:
        settings = self._settings
        if grade.problem is not None:
            grade = Grade(settings.failed_score, grade.key, grade.problem)
        elif settings.binary:
            grade = Grade(1.0 if grade.score >= settings.correct_from else 0.0, grade.key)
        with self._changed:
            if job.future not in self._underway:  # abandoned meanwhile
                return
            self._underway.remove(job.future)
            self._graded += 1
            kind = (grade.problem or "").partition(":")[0]
            if grade.problem is not None:
                self._problems[kind] += 1
            new = grade.problem is not None and self._problems[kind] == 1
        if new:
            logger.warning("an answer could not be graded (%.300r); more of this kind are only counted", grade.problem)
        job.future.set_result(grade)

    def _break(self, problem: str) -> None:
        with self._changed:
            self._broken = self._broken or problem
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            os.write(self._close, b"x")
        self._abandon(lambda: UserError(problem))

    def _abandon(self, reason: Callable[[], BaseException]) -> None:
        with self._changed:
            waiting = [job.future for job in self._waiting]
            left = [*self._underway, *(one for one in waiting if one.running() or one.set_running_or_notify_cancel())]
            self._waiting.clear()
            self._underway.clear()
        for future in left:
            future.set_exception(reason())


__all__ = ["TIME_LIMIT", "GraderPool"]
