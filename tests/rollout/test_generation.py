"""What is asked for and what comes back: seeds, limits, replies that are not what was agreed, continued answers."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_flowrl.rollout.errors import BadReply
from megatron_flowrl.rollout.generation import Answer, Job, Sampling, VersionSpan
from tests.rollout.stub_vllm import log_prob, reply

URL = "http://somewhere:1"
JOB = Job(3, 1, (7, 8), Sampling(max_tokens=5, min_tokens=3, stop_token_ids=(2,)))


def test_a_request_asks_for_tokens_and_their_log_probs() -> None:
    job = replace(JOB, sampling=replace(JOB.sampling, temperature=0.5, top_p=0.9, top_k=4))
    body = job.body()
    assert body["token_ids"] == [7, 8]
    assert body["sampling_params"] == {
        "max_tokens": 5, "min_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop_token_ids": [2],
        "ignore_eos": True, "logprobs": 0, "detokenize": False,
    }  # fmt: skip
    assert JOB.body()["sampling_params"]["top_k"] == 0  # all tokens


def test_every_answer_has_a_seed_of_its_own_that_can_be_had_again() -> None:
    def seed(prompt: int, sample: int, continuation: int, of: int = 1) -> int:
        job = Job(prompt, sample, (7,), Sampling(max_tokens=5, seed=of), continuations=continuation)
        found: int = job.body()["sampling_params"]["seed"]
        return found

    places = list(itertools.product(range(4), repeat=3))
    seeds = [seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [seed(*place) for place in places]
    assert not set(seeds) & {seed(*place, of=2) for place in places}
    assert all(0 <= one < 2**63 for one in seeds)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0),
        ("top_p", 1.1), ("top_p", math.nan), ("top_k", 0), ("min_tokens", -1), ("min_tokens", 6),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused(name: str, value: float) -> None:
    arguments: dict[str, Any] = {"max_tokens": 5, name: value}
    with pytest.raises(ValueError, match=rf"Sampling\.{name} = {value!r} cannot be"):
        Sampling(**arguments)


def test_an_answer_is_read() -> None:
    answer = JOB.read(reply([4, 5, 2], "stop", "9"), URL)
    expected = tuple(map(log_prob, (4, 5, 2)))
    assert answer == Answer(3, 1, (4, 5, 2), expected, "stop", (VersionSpan("9", 0, 3),), URL)


def test_an_answer_without_tokens_says_nothing_of_them() -> None:
    answer = JOB.read({"choices": [{"token_ids": [], "finish_reason": "abort", "logprobs": None}]}, URL)
    assert answer == Answer(3, 1, (), (), "abort", (), URL)


@pytest.mark.parametrize("what", [None, [], "text", 3, {}, {"choices": None}, {"choices": [None]}, {"choices": ["x"]}])
def test_a_reply_of_another_form_is_bad(what: Any) -> None:
    with pytest.raises(BadReply, match=f"^{URL}/inference/v1/generate answered without a"):
        JOB.read(what, URL)


def span(start: Any, end: Any) -> dict[str, Any]:
    return {"version": "9", "start": start, "end": end}


LOG_PROBS = [{"token_id": token, "logprob": -0.5} for token in (4, 5, 2)]
BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("token_ids", None, "without a list 'token_ids'"),
    ("token_ids", "4 5 2", "without a list 'token_ids'"),
    ("token_ids", [4, "5", 2], "not token ids"),
    ("token_ids", [4, True, 2], "not token ids"),
    ("token_ids", [4, -5, 2], "not token ids"),
    ("token_ids", [4, 5.0, 2], "not token ids"),
    ("finish_reason", None, "without a str 'finish_reason'"),
    ("finish_reason", "error", "finish_reason = 'error'"),
    ("logprobs", None, "without a dict 'logprobs'"),
    ("logprobs", {"content": None}, "without a list 'content'"),
    ("logprobs", {"content": LOG_PROBS[:2]}, "log-probs of other tokens"),
    ("logprobs", {"content": LOG_PROBS[::-1]}, "log-probs of other tokens"),
    ("logprobs", {"content": [None] * 3}, "log-probs of other tokens"),
    *(
        ("logprobs", {"content": [*LOG_PROBS[:2], {"token_id": 2, "logprob": value}]}, "not finite numbers")
        for value in (math.nan, -math.inf, None, "-0.5", -(10**400))
    ),
    ("weight_versions", None, r"which weights made the answer \(weight_versions\)"),
    ("weight_versions", [{"version": "9", "start": 0}], "which weights made the answer"),
    ("weight_versions", [span(0, "all")], "which weights made the answer"),
    ("weight_versions", [span(0, math.inf)], "which weights made the answer"),
    ("weight_versions", [], "do not cover its 3 tokens"),
    ("weight_versions", [span(0, 2)], "do not cover its 3 tokens"),
    ("weight_versions", [span(1, 3)], "do not cover its 3 tokens"),
    ("weight_versions", [span(0, 4)], "do not cover its 3 tokens"),
    ("weight_versions", [span(0, 1), span(2, 3)], "do not cover its 3 tokens"),
    ("weight_versions", [span(0, 2), span(1, 3)], "do not cover its 3 tokens"),
    ("weight_versions", [span(0, 5), span(5, 1), span(1, 3)], "do not cover its 3 tokens"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_FIELDS)
def test_a_reply_with_a_wrong_part_is_bad(name: str, value: Any, message: str) -> None:
    content = copy.deepcopy(reply([4, 5, 2]))
    content["choices"][0][name] = value
    with pytest.raises(BadReply, match=f"^{URL}/inference/v1/generate .*{message}"):
        JOB.read(content, URL)


@pytest.mark.parametrize("name", ["token_ids", "finish_reason", "logprobs", "weight_versions"])
def test_a_reply_without_a_part_is_bad(name: str) -> None:
    content = reply([4, 5, 2])
    del content["choices"][0][name]
    with pytest.raises(BadReply, match=f"^{URL}/inference/v1/generate .*{name}"):
        JOB.read(content, URL)


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_choices_is_bad(count: int) -> None:
    with pytest.raises(BadReply, match=f"^{URL}/inference/v1/generate answered {count} choices where 1 was asked for"):
        JOB.read({"choices": reply([4])["choices"] * count}, URL)


def test_an_answer_that_is_continued_asks_for_the_rest() -> None:
    first = JOB.read(reply([4, 5], "abort", "9"), URL)
    body = replace(JOB, so_far=first, continuations=1).body()
    assert body["token_ids"] == [7, 8, 4, 5]
    assert body["sampling_params"]["max_tokens"] == 3 and body["sampling_params"]["min_tokens"] == 1
    more = replace(JOB, so_far=JOB.read(reply([4, 5, 6, 7], "abort", "9"), URL), continuations=1)
    assert more.body()["sampling_params"]["min_tokens"] == 0


@pytest.mark.parametrize(
    ("later", "spans"),
    [
        ("9", (VersionSpan("9", 0, 3),)),  # the same weights: one span
        ("10", (VersionSpan("9", 0, 2), VersionSpan("10", 2, 3))),
    ],
)
def test_the_parts_of_an_answer_are_joined(later: str, spans: tuple[VersionSpan, ...]) -> None:
    first = JOB.read(reply([4, 5], "abort", "9"), URL)
    whole = replace(JOB, so_far=first, continuations=1).read(reply([2], "stop", later), "http://other:2")
    expected = tuple(map(log_prob, (4, 5, 2)))
    assert whole == Answer(3, 1, (4, 5, 2), expected, "stop", spans, "http://other:2")


def test_an_answer_of_three_parts_one_of_them_empty() -> None:
    job = JOB
    for part in (reply([4], "abort", "1"), reply([], "abort"), reply([5], "abort", "2")):
        job = replace(job, so_far=job.read(part, URL), continuations=job.continuations + 1)
    whole = job.read(reply([2], "length", "2"), URL)
    assert whole.token_ids == (4, 5, 2) and whole.finish_reason == "length"
    assert whole.weight_versions == (VersionSpan("1", 0, 1), VersionSpan("2", 1, 3))
