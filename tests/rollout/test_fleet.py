"""Servers share the work, failures are retried within bounds, and every job is answered once, thousands at a time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from megatron_flowrl.rollout import control, replica
from megatron_flowrl.rollout.errors import ServerError
from megatron_flowrl.rollout.fleet import Generation
from megatron_flowrl.rollout.generation import Answer, Job, Sampling
from megatron_flowrl.rollout.replica import State
from tests.rollout.stub_vllm import always, first, log_prob
from tests.rollout.test_server import wait_for


def make_jobs(count: int, max_tokens: int = 4) -> list[Job]:
    """Prompts that end with 10, 20, 30 and so on."""
    return [Job(index, 0, (1, 10 * (index + 1)), Sampling(max_tokens=max_tokens)) for index in range(count)]


def answers(generation: Generation, seconds: float = 30.0) -> list[Answer]:
    """All of them, as they come; one that does not come is an error and no endless wait."""
    came, deadline = [], time.monotonic() + seconds
    while not generation.ended:
        if (answer := generation.next(timeout=1.0)) is not None:
            came.append(answer)
        assert time.monotonic() < deadline, f"{len(came)} answers of {generation.total} came"
    return came


def assert_right(came: list[Answer], jobs: list[Job]) -> None:
    """Each job is answered once, with its own tokens."""
    assert Counter(answer.prompt_index for answer in came) == Counter(job.prompt_index for job in jobs)
    for answer in came:
        start = 10 * (answer.prompt_index + 1) + 1
        assert answer.token_ids == tuple(range(start, start + 4)), answer
        assert answer.log_probs == tuple(map(log_prob, answer.token_ids)) and answer.finish_reason == "stop"
        spans = answer.weight_versions
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])] and spans[-1].stop == 4


def test_thousands_of_answers_wait_without_a_thread_each(stub: Any, make_fleet: Any) -> None:
    server, jobs = stub(), make_jobs(3000)
    server.hold = lambda _: True
    servers = make_fleet(server, window=3000, request_timeout=200.0)
    before = threading.active_count()
    generation = servers.generate(jobs)
    wait_for(lambda: server.in_flight == 3000, 100.0)
    assert threading.active_count() - before <= 2
    server.release()
    assert_right(answers(generation, 100.0), jobs)
    assert server.most_in_flight == 3000


def test_no_jobs_no_answers(stub: Any, make_fleet: Any) -> None:
    with make_fleet(stub()).generate([]) as generation:
        assert list(generation) == [] and generation.next() is None


def test_two_generations_at_once_get_their_own_answers(stub: Any, make_fleet: Any) -> None:
    servers, jobs = make_fleet(stub()), make_jobs(20)
    one, other = servers.generate(jobs[:10]), servers.generate(jobs[10:])
    assert_right(answers(other), jobs[10:])
    assert_right(list(one), jobs[:10])


def test_a_fast_server_takes_more_and_none_more_than_its_window(stub: Any, make_fleet: Any) -> None:
    fast, slow, jobs = stub(), stub(), make_jobs(60)
    slow.hold = lambda _: True
    generation = make_fleet(fast, slow).generate(jobs)
    came = [generation.next(timeout=10.0) for _ in range(56)]  # what the slow one does not have
    assert None not in came and generation.next(timeout=0.1) is None
    assert len(fast.asked) == 56 and len(slow.asked) == 4
    slow.release()
    assert_right([*came, *answers(generation)], jobs)  # type: ignore[list-item]
    assert {answer.url for answer in came} == {fast.url}  # type: ignore[union-attr]
    assert fast.most_in_flight <= 4 and slow.most_in_flight == 4


def test_one_long_answer_does_not_hold_the_others_back(stub: Any, make_fleet: Any) -> None:
    server, jobs = stub(), make_jobs(30)
    server.hold = lambda body: body["token_ids"] == [1, 10]
    generation = make_fleet(server, window=2).generate(jobs)
    came = [generation.next(timeout=10.0) for _ in range(29)]
    assert None not in came
    server.release()
    last = answers(generation)
    assert [answer.prompt_index for answer in last] == [0]
    assert_right([*came, *last], jobs)  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["error", "html", "odd", "drop", "abort"])
def test_a_request_that_fails_is_asked_again(kind: str, stub: Any, make_fleet: Any) -> None:
    server, jobs = stub(), make_jobs(12)
    server.fault = first(3, kind)
    assert_right(answers(make_fleet(server).generate(jobs)), jobs)
    assert len(server.asked) == 15


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("error", "failed with HTTP status 500: the stub says no"),
        ("html", "did not answer JSON: <html>"),
        ("odd", "answered 0 choices where 1 was asked for"),
        ("drop", "cannot be reached: "),
        ("abort", "aborted it, unasked"),
    ],
)
def test_retries_are_bounded(kind: str, why: str, stub: Any, make_fleet: Any) -> None:
    server, jobs = stub(), make_jobs(3)
    server.fault = lambda body: kind if body["token_ids"][-1] == 20 else None
    generation = make_fleet(server, max_retries=2).generate(jobs)
    with pytest.raises(ServerError) as caught:
        answers(generation)
    message = str(caught.value)
    assert message.startswith("answer 1 to prompt 2 (2 tokens) was not answered in 3 attempts")
    assert "(generation.max_retries = 2); the last time: " in message
    assert server.url in message and why in message
    assert generation.ended and sum(body["token_ids"][-1] == 20 for body in server.asked) == 3


def test_a_request_that_is_refused_is_not_asked_again(stub: Any, make_fleet: Any) -> None:
    server = stub()
    server.fault = lambda body: "refuse" if body["token_ids"][-1] == 20 else None
    servers = make_fleet(server)
    with pytest.raises(ServerError) as caught:
        answers(servers.generate(make_jobs(3)))
    refusal = f"{server.url}/inference/v1/generate refused with HTTP status 400: the stub says no"
    assert str(caught.value) == f"answer 1 to prompt 2 (2 tokens): {refusal}"
    assert sum(body["token_ids"][-1] == 20 for body in server.asked) == 1
    jobs = make_jobs(1)
    assert_right(answers(servers.generate(jobs)), jobs)  # the server is none the worse for it


def test_an_answer_that_takes_too_long_is_asked_for_again(stub: Any, make_fleet: Any) -> None:
    server, jobs = stub(), make_jobs(3)
    server.fault = first(1, "hang")
    servers = make_fleet(server, request_timeout=0.3, max_retries=1)
    assert_right(answers(servers.generate(jobs)), jobs)
    server.fault = always("hang")
    with pytest.raises(ServerError, match=r"in 2 attempts .*/inference/v1/generate did not answer within 0\.3 s"):
        answers(servers.generate(jobs))


def test_the_first_server_that_fails_does_not_keep_its_prompts(stub: Any, make_fleet: Any) -> None:
    broken, sound, jobs = stub(), stub(), make_jobs(20)
    broken.fault = always("drop")
    generation = make_fleet(broken, sound, max_retries=40).generate(jobs)
    came = answers(generation)
    assert_right(came, jobs)
    assert {answer.url for answer in came} == {sound.url}


def test_a_generation_that_is_closed_leaves_nothing(stub: Any, make_fleet: Any) -> None:
    server, jobs = stub(), make_jobs(30)
    server.hold = lambda body: body["token_ids"][-1] > 50
    servers = make_fleet(server)
    with servers.generate(jobs) as generation:
        assert generation.next(timeout=10.0) is not None
        wait_for(lambda: server.in_flight == 4 and len(server.asked) == 9)
    assert generation.ended and generation.next() is None
    wait_for(lambda: server.in_flight == 0)
    assert server.dropped == 4 and len(server.asked) == 9
    generation.close()
    server.release()
    assert_right(answers(servers.generate(jobs)), jobs)


def test_a_fleet_that_is_closed_lets_go_of_its_requests(stub: Any, make_fleet: Any) -> None:
    server = stub()
    server.hold = lambda _: True
    servers = make_fleet(server)
    generation = servers.generate(make_jobs(8))
    wait_for(lambda: server.in_flight == 4)
    servers.close()
    servers.close()
    wait_for(lambda: server.in_flight == 0)
    assert len(server.asked) == 4
    generation.close()


def test_a_server_on_which_nothing_listens_is_named(make_fleet: Any, stub: Any) -> None:
    gone = stub()
    gone.stop()
    with pytest.raises(
        ServerError, match=f"^{gone.url}/health cannot be reached: .*generation.urls names it: start it"
    ):
        make_fleet(gone, start_timeout=0.1)


def test_a_server_that_hangs_is_given_up(stub: Any, make_fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SHORT_SECONDS", 0.1)
    hanging, sound, jobs = stub(), stub(), make_jobs(20)
    hanging.fault = always("hang")
    servers = make_fleet(hanging, sound, max_restarts=1, start_timeout=0.1)
    generation = servers.generate(jobs)
    hanging.well = False
    came = answers(generation)
    assert_right(came, jobs)
    assert {answer.url for answer in came} == {sound.url} and len(hanging.asked) == 4
    wait_for(lambda: servers.replicas[0].state is State.LOST)
    assert [one.url for one in servers.running()] == [sound.url]


def test_an_engine_that_hangs_behind_its_front_end_is_given_up(
    stub: Any, make_fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is well all the time, and whoever waits for it to come back is not taken in."""
    monkeypatch.setattr(replica, "SHORT_SECONDS", 0.2)
    hanging, slow, jobs = stub(), stub(), make_jobs(20)
    hanging.fault, hanging.tokens = always("hang"), 7
    slow.hold, slow.tokens, slow.counts = (lambda _: True), 7, True
    servers = make_fleet(hanging, slow, max_restarts=1, start_timeout=0.5, hang_seconds=0.5)
    generation = servers.generate(jobs)
    wait_for(lambda: servers.replicas[0].state is State.LOST)
    time.sleep(1.0)  # one that makes tokens may take as long as it likes
    assert servers.replicas[1].state is State.READY
    slow.release()
    came = answers(generation)
    assert_right(came, jobs)
    assert {answer.url for answer in came} == {slow.url}


def test_what_says_nothing_of_its_tokens_or_has_no_work_is_not_given_up(stub: Any, make_fleet: Any) -> None:
    silent, idle, first = stub(), stub(), stub()
    first.tokens = 0  # it compiles, which is a part of its start
    silent.hold = first.hold = lambda _: True
    servers = make_fleet(silent, first, window=1, hang_seconds=0.3)
    servers.generate(make_jobs(2))
    idle.tokens = 7
    other = make_fleet(idle, hang_seconds=0.3)
    time.sleep(1.5)
    assert [replica.state for replica in (*servers.replicas, *other.replicas)] == [State.READY] * 3
    silent.release()
    first.release()
