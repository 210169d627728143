"""What the tests of records share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from megatron_flowrl.observe.log import logger


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the program logs, however an earlier test has left its logger."""
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate = before[0]
    logger.setLevel(before[1])
