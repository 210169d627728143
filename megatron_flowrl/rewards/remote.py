"""`remote`: a grader behind HTTP, at reward.url.

    POST  {"items": [{"response", "ground_truth", "prompt", "row", "finish_reason"}]}
    reply {"grades": [{"score": 1.0, "key": "42", "problem": null}]}   key and problem may be left out
          {"scores": [1.0]}                                            is as good

A reply is one grade for one item. A server that does not answer, or answers with a status of 429 or from 500 on, is
asked again, with growing pauses, until the pool's time limit ends the attempt; any other status is the item's problem.
As many items are under way at once as there are reward.workers.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_flowrl.config.errors import UserError
from megatron_flowrl.rewards.grader import Grade, Grader, Item, shown

if TYPE_CHECKING:
    from megatron_flowrl.config import RewardConfig

_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
_LONGEST_REPLY = 2**24
_BUSY = 429


def make(settings: RewardConfig) -> Grader:
    """The grader. Raises UserError where reward.url is no address."""
    url = checked_url("reward.url", settings.url)

    def grade(items: Sequence[Item]) -> list[Grade]:
        return [_grade(url, item) for item in items]

    return grade


def check_ground_truth(ground_truth: Any, row: Mapping[str, Any] | None = None) -> str | None:
    """What cannot be sent, or None; the rest is the server's to say."""
    try:
        json.dumps(ground_truth)
    except (TypeError, ValueError) as error:
        return f"the ground truth {shown(ground_truth)} cannot be sent as JSON: {error}"
    return None


def checked_url(setting: str, url: str | None) -> str:
    """Raises UserError where a setting is no address of an HTTP server."""
    parts = urlsplit(url or "")
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is none
        good = False
    if url is None or not good:
        raise UserError(f"{setting} = {url!r} is no address; give one, such as http://127.0.0.1:8080/grade")
    return url


def post(url: str, message: object, timeout: float | None = None) -> Any:
    """The JSON that a server replies, when it does. Raises ValueError where it refuses, or replies something else."""
    request = urllib.request.Request(
        url, json.dumps(message).encode(), {"Content-Type": "application/json", "Accept": "application/json"}
    )
    deadline = None if timeout is None else time.monotonic() + timeout
    for attempt in range(2**31):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                content: bytes = reply.read(_LONGEST_REPLY)
            break
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(200).decode(errors="replace")
            if error.code != _BUSY and error.code < 500:
                raise ValueError(f"{url} answered status {error.code}: {said}") from None
            trouble = f"status {error.code}: {said}"
        except (OSError, http.client.HTTPException) as error:
            trouble = str(getattr(error, "reason", error))
        if deadline is not None and time.monotonic() > deadline:
            raise ValueError(f"{url} did not answer in {timeout:g} s ({trouble})")
        time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
    try:
        return json.loads(content)
    except ValueError:
        raise ValueError(f"{url} answered no JSON: {content[:100]!r}") from None


def _grade(url: str, item: Item) -> Grade:
    sent = {
        "response": item.response,
        "ground_truth": item.ground_truth,
        "prompt": item.prompt,
        "row": dict(item.row),
        "finish_reason": item.finish_reason,
    }
    reply = post(url, {"items": [sent]})
    grades = reply.get("grades", reply.get("scores")) if isinstance(reply, dict) else None
    if not isinstance(grades, list) or len(grades) != 1:
        raise ValueError(f"{url} answered {shown(reply)}, and not a list of one grade")
    grade: dict[str, Any] = grades[0] if isinstance(grades[0], dict) else {"score": grades[0]}
    problem, score = grade.get("problem"), grade.get("score")
    if problem is None and not isinstance(score, int | float):
        raise ValueError(f"{url} answered {shown(grades[0])}, which has no score")
    return Grade(float(score or 0.0), grade.get("key"), problem)


__all__ = ["check_ground_truth", "checked_url", "make", "post"]
