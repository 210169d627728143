"""Servers that share the work: an idle one takes the next prompt, a dead one's prompts go to the others.

Everything here but the methods of `Fleet` and `Generation` runs in one event loop (HttpLoop), so nothing is locked.

1. Jobs (an answer each) wait in one queue. A replica that is READY takes as many as its window; no more are sent ahead,
   so that long answers hold nobody back.
2. A request that fails is asked again, `max_retries` times; meanwhile its replica is DOUBTED and takes nothing. One
   that is not well is DOWN: what it was asked is put back in front, and it is started anew, `max_restarts` times.
3. A replica that comes back is STALE until it has the fleet's weights; `Fleet.stale` says so to whoever can send them.
4. Every job ends once: in an answer, or in the error that ends its generation.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rollout.control import ServerControl, on_each
from megatron_flowrl.rollout.errors import BadReply, Refused, ReplyError, ServerError, Unreachable
from megatron_flowrl.rollout.generation import ROUTE, Answer, Job
from megatron_flowrl.rollout.health import Health, hang_seconds_of
from megatron_flowrl.rollout.http import HttpLoop
from megatron_flowrl.rollout.replica import Replica, State
from megatron_flowrl.rollout.server import VllmServer, visible_gpus

_AHEAD = 8  # requests beyond what a server works on at once, so that it never waits for one
_WATCH_SECONDS = 2.0
_WATCHED = (State.READY, State.STALE, State.PAUSED)
_POLL_SECONDS = 0.01
_OVERTAKEN_SECONDS = 0.5  # what runs so long after an abort was on its way to the server then, and waits there


class Generation:
    """Answers to a list of jobs, as they finish. Leave it with `close`, or as a context manager."""

    def __init__(self, fleet: Fleet, total: int) -> None:
        self._fleet, self.total, self.finished = fleet, total, 0
        self._arrived: queue.SimpleQueue[Answer | UserError | None] = queue.SimpleQueue()
        self.ended = total == 0

    def next(self, timeout: float | None = None) -> Answer | None:
        """The next answer; None when there is none in time, when a replica turned stale, and when all have come.

        Raises UserError where the rest cannot be answered.
        """
        if self.ended:
            return None
        try:
            arrived = self._arrived.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(arrived, UserError):
            self.close()
            raise arrived
        if arrived is not None:
            self.finished += 1
            self.ended = self.finished == self.total
        return arrived

    def close(self) -> None:
        """Forget what has not been answered."""
        self.ended = True
        self._fleet.forget(self)

    def __iter__(self) -> Iterator[Answer]:
        while not self.ended:
            if (answer := self.next()) is not None:
                yield answer

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, arrived: Answer | UserError | None) -> None:
        """From the loop: an answer, the error that ends it all, or None to have a look at the fleet."""
        self._arrived.put(arrived)


@dataclass
class _Task:
    job: Job
    generation: Generation
    attempts: int = 0


@dataclass
class _Work:
    """What waits, and whom it is for."""

    waiting: deque[_Task] = field(default_factory=deque)
    generations: set[Generation] = field(default_factory=set)


class Fleet:
    """The servers of a run. Its methods are for one thread; `close` it, or use it as a context manager.

    `version` is the weights that answers have to be made by, None as long as none were sent.
    """

    def __init__(
        self,
        http: HttpLoop,
        replicas: Sequence[Replica],
        *,
        request_timeout: float,
        max_retries: int,
        max_restarts: int,
        hang_seconds: float = 0.0,
    ) -> None:
        self.http, self.replicas = http, list(replicas)
        self.version: str | None = None
        self._request_timeout, self._max_retries, self._max_restarts = request_timeout, max_retries, max_restarts
        self._hang_seconds = hang_seconds
        self._work = _Work()
        self._background: set[asyncio.Task[None]] = set()
        self._closing = False

    def start(self) -> None:
        """Have every server running and ready. Raises ServerError where one does not start."""
        self.http.run(self._start())

    def generate(self, jobs: Iterable[Job]) -> Generation:
        """Begin to answer the jobs, and return at once."""
        jobs = list(jobs)
        generation = Generation(self, len(jobs))
        if jobs:
            self.http.run(self._add([_Task(job, generation) for job in jobs], generation))
        return generation

    def forget(self, generation: Generation) -> None:
        """Drop what waits or is being answered for it."""
        if not self._closing:
            self.http.run(self._forget(generation))

    def stale(self) -> list[ServerControl]:
        """Servers that run, but not with `version`."""
        return [replica.control for replica in self.replicas if replica.state is State.STALE]

    def running(self) -> list[ServerControl]:
        """Servers that are not gone, for now or for good."""
        return [r.control for r in self.replicas if r.state not in (State.DOWN, State.LOST)]

    def on_each(
        self, servers: Sequence[ServerControl], action: Callable[[ServerControl], Awaitable[object]]
    ) -> dict[str, ReplyError]:
        """Do it on these servers at once; what went wrong, by address."""
        return self.http.run(on_each(servers, action))

    def pause(self, servers: Sequence[ServerControl], *, abort: bool) -> Future[dict[str, ReplyError]]:
        """Begin to send these servers nothing more and let what they work on finish, or with `abort` stop at once.

        Aborted answers keep what they have, and go on when there is a server for them. Prefix caches are empty
        afterwards. The result is what went wrong, by address.
        """
        return self.http.start(self._pause(servers, abort))

    def resume(self, servers: Sequence[ServerControl], version: str | None) -> None:
        """Give these servers prompts again; the fleet's weights are `version` from now on."""
        self.http.run(self._resume(servers, version))

    def give_up(self, servers: Sequence[ServerControl], why: str) -> None:
        """End these servers, whose state is not known, and start them again behind the scenes."""
        self.http.run(self._give_up(servers, why))

    def wait_for_running(self, timeout: float) -> bool:
        """Until a server runs; False where none does in time. Raises ServerError where none ever will."""
        deadline = time.monotonic() + timeout
        while not self.running():
            if all(replica.state is State.LOST for replica in self.replicas):
                raise self._all_lost()
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def close(self) -> None:
        """End what is under way, and every server of ours; safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self.http.run(self._end_background())
        for replica in self.replicas:
            if replica.process is not None:
                replica.process.ask_to_stop()  # all at once
        for replica in self.replicas:
            if replica.process is not None:
                replica.process.stop()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the loop.

    async def _start(self) -> None:
        outcomes = await asyncio.gather(*(replica.start() for replica in self.replicas), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        for replica in self.replicas:
            replica.state = State.READY
        self._spawn(self._watch())

    async def _add(self, tasks: list[_Task], generation: Generation) -> None:
        self._work.generations.add(generation)
        self._work.waiting.extend(tasks)
        self._dispatch()

    async def _forget(self, generation: Generation) -> None:
        self._work.generations.discard(generation)
        self._work.waiting = deque(task for task in self._work.waiting if task.generation is not generation)
        for replica in self.replicas:
            for asking in list(replica.asking):
                if asking.get_name() == str(id(generation)):
                    asking.cancel()

    def _dispatch(self) -> None:
        """Give waiting jobs to the replicas with the most room."""
        while self._work.waiting:
            replica = max(self.replicas, key=lambda one: one.room)
            if replica.room <= 0:
                break
            task = self._work.waiting.popleft()
            given = replica.control.weight_version
            asking = asyncio.get_running_loop().create_task(
                self._ask(replica, replica.control, task, given), name=str(id(task.generation))
            )
            replica.asking.add(asking)
            asking.add_done_callback(partial(self._asked, replica, task))
        if self._work.waiting and all(replica.state is State.LOST for replica in self.replicas):
            self._fail(self._all_lost())

    def _asked(self, replica: Replica, task: _Task, asking: asyncio.Task[None]) -> None:
        replica.asking.discard(asking)
        if asking.cancelled():  # perhaps before it began; its server was given up, or its generation, not the job
            self._again(task, "its server was given up")
        elif (error := asking.exception()) is not None:  # a defect of ours: it must not leave the job unanswered
            logger.error("an answer failed unexpectedly", exc_info=error)
            self._fail(ServerError(f"{_name(task.job)}: {error!r}"), task.generation)
        self._dispatch()

    async def _ask(self, replica: Replica, control: ServerControl, task: _Task, given: str | None) -> None:
        """`given`: the weights that the server had been given then; it may turn stale meanwhile."""
        try:
            reply = await control.post(ROUTE, task.job.body(), timeout=self._request_timeout)
            answer = task.job.read(reply, control.url)
            _check_version(given, task.job, answer)
        except Refused as error:
            self._fail(_about(task.job, error), task.generation)
        except ReplyError as error:
            if replica.state is State.READY:
                replica.state = State.DOUBTED
                self._spawn(self._examine(replica, str(error)))
            self._again(task, str(error))
        else:
            self._take(replica, task, answer)

    def _take(self, replica: Replica, task: _Task, answer: Answer) -> None:
        if answer.finish_reason != "abort":
            replica.restarts = 0  # it does answer: what is counted is failures in a row
            if task.generation in self._work.generations:
                task.generation.put(answer)
            return
        if len(answer.token_ids) >= task.job.sampling.max_tokens:
            if task.generation in self._work.generations:
                task.generation.put(replace(answer, finish_reason="length"))
            return
        had = task.job.so_far.token_ids if task.job.so_far is not None else ()
        task.job = replace(task.job, so_far=answer, continuations=task.job.continuations + 1)
        if len(answer.token_ids) == len(had) and replica.state is State.READY:
            self._again(task, f"{replica.url} aborted it, unasked")
        elif task.generation in self._work.generations:
            self._work.waiting.appendleft(task)

    def _again(self, task: _Task, why: str) -> None:
        if task.generation not in self._work.generations:
            return
        task.attempts += 1
        if task.attempts > self._max_retries:
            message = f"was not answered in {task.attempts} attempts (generation.max_retries = {self._max_retries})"
            self._fail(ServerError(f"{_name(task.job)} {message}; the last time: {why}"), task.generation)
        else:
            self._work.waiting.appendleft(task)

    def _fail(self, error: UserError, generation: Generation | None = None) -> None:
        """End a generation, or all, with an error."""
        for one in [generation] if generation is not None else list(self._work.generations):
            if one in self._work.generations:
                self._work.generations.discard(one)
                self._work.waiting = deque(task for task in self._work.waiting if task.generation is not one)
                one.put(error)

    async def _examine(self, replica: Replica, why: str) -> None:
        """A request has failed: is it the server?"""
        try:
            well = await replica.is_well()
            current = well and await replica.has_given_weights()
        except ReplyError:
            well = current = False
        if replica.state is not State.DOUBTED:
            return
        if not well:
            await self._take_down(replica, why)
        elif current:
            replica.state = State.READY
            self._dispatch()
        else:
            logger.warning("%s has been started again by others: it gets the current weights", replica.url)
            self._turn_stale(replica)

    async def _watch(self) -> None:
        """Look at the servers now and then."""
        seen: dict[Replica, Health] = {}
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            watched = [r for r in self.replicas if r.state in _WATCHED]
            seen = {replica: seen.get(replica) or Health(self._hang_seconds) for replica in watched}
            looks = [seen[replica].look(replica) for replica in watched]
            for replica, why in zip(watched, await asyncio.gather(*looks), strict=True):
                if why is not None and replica.state in _WATCHED:
                    await self._take_down(replica, f"{replica.url} {why}")

    async def _take_down(self, replica: Replica, why: str) -> None:
        replica.state = State.DOWN
        logger.warning("server %s is given up (%s)%s", replica.url, why, replica.describe_end())
        for asking in list(replica.asking):
            asking.cancel()
        self._spawn(self._bring_back(replica))

    async def _bring_back(self, replica: Replica) -> None:
        while replica.restarts < self._max_restarts:
            try:
                await replica.start_again()
            except Exception as error:  # whatever it is: the attempts are bounded, and the fleet goes on
                logger.warning("server %s could not be started again: %s", replica.url, error)
                continue
            logger.info("server %s is there again", replica.url)
            if self.version is None:
                replica.state = State.READY
                self._dispatch()
            else:
                self._turn_stale(replica)
            return
        if replica.process is not None:
            await asyncio.to_thread(replica.process.stop)
        replica.state = State.LOST
        logger.error("server %s is lost: rollout.max_restarts = %d is used up", replica.url, self._max_restarts)
        self._dispatch()
        self._nudge()

    def _turn_stale(self, replica: Replica) -> None:
        replica.state = State.STALE
        replica.control.weight_version = None
        self._nudge()

    def _nudge(self) -> None:
        for generation in self._work.generations:
            generation.put(None)

    async def _pause(self, servers: Sequence[ServerControl], abort: bool) -> dict[str, ReplyError]:
        replicas = self._replicas_of(servers)
        there = [replica.control for replica in replicas]
        troubles: dict[str, ReplyError] = {
            server.url: Unreachable(f"{server.url} has been given up meanwhile")
            for server in servers
            if server not in there
        }
        for replica in replicas:
            replica.state = State.PAUSED
        if not abort:
            await _drained(replicas)
        mode = "abort" if abort else "wait"
        while replicas:
            troubles |= await on_each([replica.control for replica in replicas], lambda control: control.pause(mode))
            well = [replica for replica in replicas if replica.url not in troubles]
            await _drained(well, _OVERTAKEN_SECONDS)
            replicas = [replica for replica in well if replica.asking]
        return troubles

    async def _resume(self, servers: Sequence[ServerControl], version: str | None) -> None:
        self.version = version
        troubles = await on_each([replica.control for replica in self._replicas_of(servers)], ServerControl.resume)
        for replica in self._replicas_of(servers):
            if replica.url in troubles:
                await self._take_down(replica, str(troubles[replica.url]))
            else:
                replica.state = State.READY
        for replica in self.replicas:
            if replica.state is State.READY and replica.control.weight_version != version:
                self._turn_stale(replica)
        self._dispatch()

    async def _give_up(self, servers: Sequence[ServerControl], why: str) -> None:
        for replica in self._replicas_of(servers):
            await self._take_down(replica, why)

    async def _end_background(self) -> None:
        self._work.generations.clear()
        self._work.waiting.clear()
        tasks = [*self._background, *(asking for replica in self.replicas for asking in replica.asking)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # a defect of ours: nobody may wait for it
            logger.error("the fleet's own work failed", exc_info=error)
            self._fail(ServerError(f"the fleet's own work failed: {error!r}"))

    def _replicas_of(self, servers: Sequence[ServerControl]) -> list[Replica]:
        """Without those that have been given up since: they are being started again."""
        gone = (State.DOWN, State.LOST)
        return [replica for replica in self.replicas if replica.control in servers and replica.state not in gone]

    def _all_lost(self) -> ServerError:
        urls = ", ".join(replica.url for replica in self.replicas)
        return ServerError(f"no server is left ({urls}); their logs say why. Prompts that wait are not answered")


async def _drained(replicas: Sequence[Replica], seconds: float | None = None) -> None:
    """Until every request to them has ended, well or not, or so long; each has a time limit of its own."""
    if asking := [task for replica in replicas for task in replica.asking]:
        await asyncio.wait(asking, timeout=seconds)


def _check_version(given: str | None, job: Job, answer: Answer) -> None:
    had = len(job.so_far.token_ids) if job.so_far is not None else 0
    wrong = {span.version for span in answer.weight_versions if span.stop > had} - {given}
    if given is not None and wrong:
        raise BadReply(f"{answer.url} answered with weights {', '.join(sorted(wrong))} instead of {given}")


def _name(job: Job) -> str:
    return f"answer {job.sample_index + 1} to prompt {job.prompt_index + 1} ({len(job.prompt)} tokens)"


def _about(job: Job, error: ReplyError) -> UserError:
    return ServerError(f"{_name(job)}: {error}")


def make_fleet(config: Config, http: HttpLoop, targets: Sequence[VllmServer | str]) -> Fleet:
    """A fleet of servers of ours, and addresses of others', as rollout and generation say; not started yet."""
    rollout, generation = config.rollout, config.generation
    replicas = [
        Replica(
            http,
            target,
            window=rollout.max_num_seqs + _AHEAD,
            control_timeout=rollout.transfer_timeout_seconds,
            start_timeout=rollout.start_timeout_seconds,
        )
        for target in targets
    ]
    return Fleet(
        http,
        replicas,
        request_timeout=generation.request_timeout_seconds,
        max_retries=generation.max_retries,
        max_restarts=rollout.max_restarts,
        hang_seconds=hang_seconds_of(rollout.hang_seconds, visible_gpus()),
    )
