"""What `plan` leaves in a process: log handlers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    ours = logging.getLogger("megatron_flowrl")
    before = list(ours.handlers), ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = before[0], before[1]
    ours.setLevel(before[2])
