"""Stubs and fleets for tests, ended with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_flowrl.rollout import fleet, replica
from megatron_flowrl.rollout.fleet import Fleet
from megatron_flowrl.rollout.http import HttpLoop
from megatron_flowrl.rollout.replica import Replica
from megatron_flowrl.rollout.server import VllmServer
from tests.rollout.stub_vllm import StubServer


@pytest.fixture
def stub() -> Iterator[Callable[[], StubServer]]:
    """Makes stubs, and ends them."""
    made: list[StubServer] = []

    def make() -> StubServer:
        made.append(StubServer().start())
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def make_fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    """Makes fleets that look at their servers more often, and closes them."""
    monkeypatch.setattr(fleet, "_WATCH_SECONDS", 0.1)
    monkeypatch.setattr(replica, "_POLL_SECONDS", 0.02)
    made: list[Fleet] = []
    http = HttpLoop()

    def make(
        *targets: VllmServer | StubServer | str,
        window: int = 4,
        request_timeout: float = 20.0,
        max_retries: int = 3,
        max_restarts: int = 2,
        start_timeout: float = 20.0,
        hang_seconds: float = 0.0,
    ) -> Fleet:
        places = [target.url if isinstance(target, StubServer) else target for target in targets]
        replicas = [
            Replica(http, place, window=window, control_timeout=10.0, start_timeout=start_timeout) for place in places
        ]
        limits: dict[str, Any] = {"max_retries": max_retries, "max_restarts": max_restarts}
        limits["hang_seconds"] = hang_seconds
        made.append(Fleet(http, replicas, request_timeout=request_timeout, **limits))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()
    http.close()
