"""The trainer's end of sampling, on a GPU that servers share: what happens in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_flowrl.rollout.sampler import Sampler, _Next


class Server:
    url, has_met = "http://a", False

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def wake_up(self, tag: str) -> None:
        self._said.append(f"wake up {tag}")


class Fleet:
    def on_each(self, servers: Sequence[Server], action: Callable[[Server], None]) -> dict[str, Any]:
        for server in servers:
            action(server)
        return {}

    def resume(self, servers: Sequence[Server], version: str) -> None: ...


class Transfer:
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def init(self, servers: Sequence[Server]) -> dict[str, Any]:
        return {}

    def send(self, servers: Sequence[Server], version: str) -> dict[str, Any]:
        self._said.append("send")
        return {}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("empty"))
    monkeypatch.setattr(dist, "barrier", lambda group: found.append("barrier"))
    return found


def rank_of(said: list[str], *, sleeps: bool, heard: Sequence[tuple[_Next, Any]] = ()) -> Any:
    sampler: Any = object.__new__(Sampler)
    coming = iter(heard)
    sampler.__dict__.update(
        _transfer=Transfer(said),
        _sleeps=sleeps,
        _asleep=True,
        _group=None,
        _on_wait=lambda: False,
        _say=lambda what, content: None,
        _hear=lambda: next(coming),
    )
    return sampler


def test_keys_and_values_come_when_every_rank_has_given_back_what_the_transfer_took(said: list[str]) -> None:
    rank_of(said, sleeps=True)._send_to(Fleet(), [Server(said)], "one")
    assert said == ["wake up weights", "send", "empty", "barrier", "wake up kv_cache"]
    said.clear()
    rank_of(said, sleeps=True, heard=[(_Next.SEND, "one"), (_Next.DONE, None)])._follow()
    assert said == ["send", "empty", "barrier"]


def test_where_nothing_is_shared_nothing_is_given_back(said: list[str]) -> None:
    rank_of(said, sleeps=False, heard=[(_Next.SEND, "one"), (_Next.DONE, None)])._follow()
    assert said == ["send"]
