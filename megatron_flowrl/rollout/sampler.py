"""Servers with the trainer's weights: what the training loop samples from.

Every rank of the trainer has a `Sampler` and calls the same methods in the same order. Only rank 0 talks to servers;
the others give their shards of the weights, also in the midst of a generation, when a server had to be started again.
Rank 0 says what comes next over a gloo group of its own, at least every few seconds, so that no time limit on
collectives bounds how long a generation may take.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.config import Config, SharedUserError, UserError
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import World, together
from megatron_flowrl.rollout.control import ServerControl
from megatron_flowrl.rollout.errors import Interrupted, LeaderStopped
from megatron_flowrl.rollout.fleet import Fleet, Generation, make_fleet
from megatron_flowrl.rollout.generation import Answer, Job, Sampling
from megatron_flowrl.rollout.http import HttpLoop
from megatron_flowrl.rollout.serve import make_servers, transfer_backend
from megatron_flowrl.rollout.server import visible_gpus
from megatron_flowrl.rollout.transfer.base import TransferTimes, Troubles
from megatron_flowrl.rollout.transfer.select import make_transfer

_SAY_SECONDS = 20.0  # rank 0 says something at least so often
_LOOK_SECONDS = 0.5  # and looks so often whether the run is to end
_SILENCE_SECONDS = 1800.0  # what the others stand of it, beside the time limits of the settings


class _Next(Enum):
    """What rank 0 says comes next."""

    WAIT = "wait"  # nothing yet
    SEND = "send"  # a transfer
    DONE = "done"
    FAIL = "fail"
    END = "end"  # the run is to end
    GONE = "gone"  # rank 0 has met a defect


@dataclass(frozen=True)
class SyncReport:
    """A finished update: seconds by part, bytes of the weights, and, on rank 0, how many servers have them."""

    version: str
    seconds: TransferTimes
    nbytes: int
    servers: int


@dataclass
class Pending:
    """Answers that are being sampled; on the other ranks, nothing."""

    generation: Generation | None
    answers: dict[tuple[int, int], Answer] = field(default_factory=dict)


class Sampler:
    """All ranks construct it together; close it, or use it as a context manager.

    `companions` is the folder with config.json of the model. Servers that are started here begin with random weights,
    and need no others there: the first `sync` brings them, and `begin` refuses before it. `on_wait` is called
    again and again while a rank waits; where it returns true on rank 0, waiting ends with Interrupted on every rank.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        model: ParallelModel,
        companions: Path,
        logs: Path,
        on_wait: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, rollout = config, config.rollout
        self._on_wait = on_wait
        silence = _SILENCE_SECONDS + rollout.start_timeout_seconds + 4 * rollout.transfer_timeout_seconds
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=silence))
        self._http: HttpLoop | None = None
        self._fleet: Fleet | None = None
        self._last_said = time.monotonic()
        self._asleep = self._in_transfer = False
        self._synced: str | None = None
        backend = ""
        with together():
            backend = transfer_backend(config)
            if world.rank == 0:
                self._http = HttpLoop()
                targets = config.generation.urls or make_servers(config, companions, logs, random_weights=True)
                self._fleet = make_fleet(config, self._http, targets)
        stream = WeightStream(model, dtype=getattr(torch, rollout.dtype))
        try:
            self._transfer = make_transfer(backend, config, stream, companions)
        except BaseException:
            if self._http is not None:
                self._http.close()
            raise
        self._sleeps = rollout.colocated and visible_gpus() > 0

    def start(self) -> None:
        """Have all servers ready. Raises SharedUserError, on every rank, where one does not start."""
        fleet = self._fleet
        if fleet is None:
            self._follow()
            return
        with self._leading():
            logger.info("starting %d vLLM server%s", len(fleet.replicas), "s" * (len(fleet.replicas) > 1))
            fleet.start()

    def is_stale(self) -> bool:
        """On rank 0: whether nothing was sent yet, or some server has other weights than those sent last."""
        servers = self._fleet.running() if self._fleet is not None else []
        return self._transfer.version is None or any(map(self._transfer.is_stale, servers))

    def sync(self, version: str) -> SyncReport:
        """Give the weights, as they are now, to every server; answers are made by `version` from now on.

        What is being sampled meanwhile is finished first, or aborted and continued (generation.in_flight_at_sync).
        Servers that fail are started again and get the weights later; one at least has them when this returns. Raises
        SharedUserError where none is left.
        """
        if version == self._synced:
            raise ValueError(f"version {version!r} was sent already: other weights need a name of their own")
        self._transfer.times = TransferTimes()
        if self._sleeps:  # what torch's allocator keeps for the next activations, servers need for keys and values
            torch.cuda.empty_cache()
        fleet, count = self._fleet, 0
        if fleet is None:
            self._follow()
        else:
            with self._leading():
                while count == 0:
                    while not fleet.wait_for_running(_LOOK_SECONDS):
                        self._wait()
                    self._send_to(fleet, [s for s in fleet.running() if s.weight_version != version], version)
                    count = sum(server.weight_version == version for server in fleet.running())
        self._asleep, self._synced = False, version
        return SyncReport(version, self._transfer.times, self._transfer.nbytes, count)

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int) -> Pending:
        """Begin to sample n answers to each prompt (token ids), and return at once; `finish` brings them.

        In between, the trainer's weights may not change without a `sync`: a server that has to be started again gets
        them as they are then.
        """
        if self._asleep:
            raise RuntimeError("the servers sleep: sync wakes them")
        if self._synced is None:
            raise RuntimeError("the servers have no weights of the trainer's yet: sync sends them")
        if self._fleet is None:
            return Pending(None)
        jobs = [
            Job(index, sample, tuple(prompt), sampling) for index, prompt in enumerate(prompts) for sample in range(n)
        ]
        return Pending(self._fleet.generate(jobs))

    def finish(self, pending: Pending, on_answer: Callable[[Answer], object] = lambda _: None) -> list[Answer]:
        """On rank 0 the answers, prompt by prompt; the other ranks get an empty list.

        `on_answer` is called on rank 0 for each as it finishes. Every prompt is answered, by the weights that were sent
        last, whatever happens to servers; where none is left, SharedUserError is raised on every rank.
        """
        if self._asleep:
            raise RuntimeError("the servers sleep: sync wakes them")
        fleet, generation = self._fleet, pending.generation
        if fleet is None or generation is None:
            self._follow()
            return []
        with self._leading(), generation:
            while not generation.ended:
                answer = generation.next(timeout=_LOOK_SECONDS)
                if answer is not None:
                    pending.answers[answer.prompt_index, answer.sample_index] = answer
                    on_answer(answer)
                stale = fleet.stale() if answer is None or self._is_silent() else []
                if stale:
                    self._send_to(fleet, stale, fleet.version)
                else:
                    self._wait()
        return [pending.answers[key] for key in sorted(pending.answers)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        on_answer: Callable[[Answer], object] = lambda _: None,
    ) -> list[Answer]:
        """`begin` and `finish` in one."""
        return self.finish(self.begin(prompts, sampling, n), on_answer)

    def sleep(self) -> None:
        """Leave the GPUs to the trainer until the next sync. Nothing to do where they are not shared, and on a CPU."""
        if not self._sleeps:
            return
        fleet = self._fleet
        if fleet is None:
            self._follow()
        else:
            with self._leading():
                servers = fleet.running()
                troubles = self._pause(fleet, servers)
                troubles |= fleet.on_each(_without(servers, troubles), ServerControl.sleep)
                _give_up(fleet, servers, troubles)
        self._asleep = True

    def close(self) -> None:
        """End the servers of ours, and give everything back; safe to call twice."""
        if self._fleet is not None:
            self._fleet.close()
        if self._http is not None:
            self._http.close()
        self._transfer.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_to(self, fleet: Fleet, servers: Sequence[ServerControl], version: str | None) -> None:
        """Rank 0: a transfer with all ranks, where there is a server for it; else a sign of life."""
        if not servers or version is None:
            self._say(_Next.WAIT, None)
            return
        asleep, self._asleep = self._asleep, False
        if asleep:
            troubles = fleet.on_each(servers, lambda server: server.wake_up("weights"))
        else:
            troubles = self._pause(fleet, servers)
        self._say(_Next.SEND, version)  # the others enter collectives now, whose time is short
        self._in_transfer = True
        troubles |= self._transfer.init([s for s in _without(servers, troubles) if not s.has_met])
        troubles |= self._transfer.send(_without(servers, troubles), version)
        self._leave_room()
        self._in_transfer = False
        if asleep:
            troubles |= fleet.on_each(_without(servers, troubles), lambda server: server.wake_up("kv_cache"))
        for server in _without(servers, troubles):
            server.has_met = True
        fleet.resume(_without(servers, troubles), version)
        _give_up(fleet, servers, troubles)

    def _leave_room(self) -> None:
        """All ranks, after a transfer: what it took is the GPU's again before servers make keys and values there."""
        if self._sleeps:
            torch.cuda.empty_cache()
            dist.barrier(group=self._group)

    def _wait(self) -> None:
        """Rank 0: where there is nothing to do. A sign of life, if it is time; raises Interrupted."""
        if self._on_wait():
            logger.warning("the run is to end: what is being sampled is given up")
            raise Interrupted("the run was asked to end while it waited for servers")
        if self._is_silent():
            self._say(_Next.WAIT, None)

    def _is_silent(self) -> bool:
        return time.monotonic() - self._last_said > _SAY_SECONDS

    def _pause(self, fleet: Fleet, servers: Sequence[ServerControl]) -> Troubles:
        """Rank 0: have servers paused, which may take as long as an answer, with signs of life meanwhile."""
        pausing = fleet.pause(servers, abort=self._config.generation.in_flight_at_sync == "abort")
        while True:
            try:
                return pausing.result(timeout=_SAY_SECONDS)
            except TimeoutError:
                if pausing.done():
                    raise
                self._say(_Next.WAIT, None)

    def _follow(self) -> None:
        """The other ranks: take part in what rank 0 says, until it is done."""
        while True:
            what, content = self._hear()
            self._on_wait()
            if what is _Next.SEND:
                with suppress(SharedUserError):  # rank 0 has met it too, and will say so
                    self._transfer.init([])
                    self._transfer.send([], str(content))
                    self._leave_room()
            elif what is _Next.FAIL:
                raise SharedUserError(*content)
            elif what is _Next.END:
                raise Interrupted(*content)
            elif what is _Next.GONE:
                raise LeaderStopped(*content)
            elif what is _Next.DONE:
                return

    @contextmanager
    def _leading(self) -> Iterator[None]:
        """Rank 0: tell the others how it ended."""
        try:
            yield
        except Interrupted as error:
            self._say(_Next.END, error.problems)
            raise
        except BaseException as error:
            problems = error.problems if isinstance(error, UserError) else (f"rank 0 has stopped: {error!r}",)
            # Within a transfer the others listen only where they have met the same error.
            if isinstance(error, SharedUserError) or not self._in_transfer:
                self._say(_Next.FAIL if isinstance(error, UserError) else _Next.GONE, problems)
            self._in_transfer = False
            if isinstance(error, UserError):
                raise SharedUserError(*problems) from error
            raise
        self._say(_Next.DONE, None)

    def _say(self, what: _Next, content: Any) -> None:
        dist.broadcast_object_list([what, content], src=0, group=self._group)
        self._last_said = time.monotonic()

    def _hear(self) -> tuple[_Next, Any]:
        heard: list[Any] = [None, None]
        dist.broadcast_object_list(heard, src=0, group=self._group)
        return heard[0], heard[1]


def _without(servers: Sequence[ServerControl], troubles: Troubles) -> list[ServerControl]:
    return [server for server in servers if server.url not in troubles]


def _give_up(fleet: Fleet, servers: Sequence[ServerControl], troubles: Troubles) -> None:
    for server in servers:
        if server.url in troubles:
            fleet.give_up([server], str(troubles[server.url]))
