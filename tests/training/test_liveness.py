"""A rank's place in the ring, beside a store of this process that plays the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from megatron_flowrl.platform.distributed import World
from megatron_flowrl.training import liveness
from megatron_flowrl.training.liveness import Liveness


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """That of the launcher."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(liveness, "_SAY_SECONDS", 0.02)
    return store


@pytest.fixture
def ring(store: TCPStore) -> Iterator[Liveness]:
    """Rank 1 of 3, which listens to rank 2."""
    ring = Liveness(World(rank=1, size=3), "here")
    ring.start()
    yield ring
    ring.close()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def words(store: TCPStore) -> PrefixStore:
    return PrefixStore("here", store)


def test_a_neighbour_that_writes_no_more_is_named(store: TCPStore, ring: Liveness) -> None:
    words(store).set("2", "1 node-b")
    until(lambda: ring._host == "node-b")
    heard = ring._heard
    assert ring.trouble(heard + 59) is None
    until(lambda: ring._answered > heard + 0.2)  # the store goes on answering
    ring._answered = heard + 60
    assert ring.trouble(heard + 61) == (
        "rank 2 on node-b has given no sign of life for 61 s: its process or node stands still"
    )
    ring.forgive()
    assert ring.trouble(time.monotonic() + 59) is None


def test_this_rank_is_heard_and_says_when_it_ends(store: TCPStore, ring: Liveness) -> None:
    until(lambda: store.check(["here/1"]))
    first = words(store).get("1")
    until(lambda: words(store).get("1") != first)
    ring.close()
    assert words(store).get("1") == b"ended"


def test_a_neighbour_that_has_ended_is_not_missed(store: TCPStore, ring: Liveness) -> None:
    words(store).set("2", "ended")
    until(lambda: ring._over)
    assert ring.trouble(time.monotonic() + 1e4) is None


def test_a_store_that_does_not_answer_tells_nothing(store: TCPStore, ring: Liveness) -> None:
    until(lambda: store.check(["here/1"]))
    now = time.monotonic()
    ring._heard = ring._answered = now - 1000
    assert ring.trouble(now) is None


def test_a_store_that_is_gone_ends_the_watch_alone(monkeypatch: pytest.MonkeyPatch, store: TCPStore) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(liveness, "_CONNECT_SECONDS", 0.2)
    ring = Liveness(World(rank=0, size=2), "here")
    ring.start()
    until(lambda: ring._over)
    assert ring.trouble(time.monotonic() + 1e4) is None
    ring.close()


def test_a_world_of_one_has_no_ring() -> None:
    ring = Liveness(World(), "here")
    ring.start()
    assert ring.trouble(time.monotonic() + 1e4) is None
    assert not [thread for thread in threading.enumerate() if thread.name == "liveness"]
    ring.close()
