"""Servers that die, come back, are paused, or have other weights than they were given: no answer is lost or wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.config import RolloutConfig
from megatron_flowrl.rollout import server
from megatron_flowrl.rollout.control import ServerControl
from megatron_flowrl.rollout.errors import Refused, ServerError, Unreachable
from megatron_flowrl.rollout.fleet import Fleet, Generation, _Task
from megatron_flowrl.rollout.generation import VersionSpan
from megatron_flowrl.rollout.replica import State
from megatron_flowrl.rollout.server import VllmServer
from tests.rollout import stub_vllm
from tests.rollout.stub_vllm import StubServer, always
from tests.rollout.test_fleet import answers, assert_right, make_jobs
from tests.rollout.test_server import wait_for


class StubProcess(VllmServer):
    """A server of ours, with the stub behind the guard: its lives end at these requests."""

    def __init__(self, folder: Path, *dies_at: int) -> None:
        super().__init__(RolloutConfig(start_timeout_seconds=20.0), folder / "model", folder / "server.log")
        self.dies_at, self.lives = dies_at, 0

    def command(self) -> list[str]:
        ends = list(map(str, self.dies_at[self.lives : self.lives + 1]))
        self.lives += 1
        return [sys.executable, stub_vllm.__file__, str(self.port), *ends]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes servers of ours; the fleet ends them."""
    monkeypatch.setattr(server, "_POLL_SECONDS", 0.02)
    return lambda *dies_at: StubProcess(tmp_path, *dies_at)


def give(servers: Fleet, version: str) -> None:
    """New weights for all that run or are stale."""
    controls = servers.running()
    assert servers.pause(controls, abort=True).result() == {}
    assert servers.on_each(controls, lambda control: control.finish_weight_update(version)) == {}
    servers.resume(controls, version)


def versions(came: list[Any]) -> set[str]:
    return {span.version for answer in came for span in answer.weight_versions}


def test_a_server_that_dies_is_started_again_and_its_prompts_are_sent_again(own: Any, make_fleet: Any) -> None:
    process, jobs = own(7), make_jobs(20)
    servers = make_fleet(process)
    assert_right(answers(servers.generate(jobs)), jobs)
    assert process.lives == 2 and process.is_running() and servers.stale() == []
    servers.close()
    assert not process.is_running()


def test_a_server_that_dies_between_generations_is_started_again_with_old_weights(own: Any, make_fleet: Any) -> None:
    """It is stale then, and gets no prompts before it has the fleet's weights."""
    process, jobs = own(), make_jobs(6)
    servers = make_fleet(process)
    give(servers, "1")
    assert versions(answers(servers.generate(jobs))) == {"1"}
    process.stop()
    wait_for(lambda: servers.replicas[0].state is State.DOWN)
    wait_for(lambda: len(servers.stale()) == 1)
    assert process.lives == 2
    generation = servers.generate(jobs)
    assert generation.next(timeout=0.1) is None
    give(servers, "1")
    came = answers(generation)
    assert_right(came, jobs)
    assert versions(came) == {"1"}


def test_a_server_that_is_not_started_any_more_leaves_its_prompts_to_another(
    own: Any, stub: Any, make_fleet: Any
) -> None:
    process, sound, jobs = own(3, 0), stub(), make_jobs(20)
    sound.hold = lambda _: len(sound.asked) < 4  # so that the other is asked as well
    servers = make_fleet(process, sound, max_restarts=1)
    generation = servers.generate(jobs)
    wait_for(lambda: servers.replicas[0].state is State.LOST)
    sound.release()
    assert_right(answers(generation), jobs)
    assert process.lives == 2 and [one.url for one in servers.running()] == [sound.url]


def test_without_any_server_left_generations_end_with_an_error(own: Any, make_fleet: Any) -> None:
    process = own(3, 1)
    servers = make_fleet(process, max_restarts=1, max_retries=9)
    with pytest.raises(ServerError, match="no server is left") as caught:
        answers(servers.generate(make_jobs(8)))
    assert process.url in str(caught.value) and process.lives == 2
    with pytest.raises(ServerError, match="no server is left"):
        answers(servers.generate(make_jobs(1)))
    with pytest.raises(ServerError, match="no server is left"):
        servers.wait_for_running(1.0)


def test_an_answer_ends_the_count_of_restarts(own: Any, make_fleet: Any) -> None:
    process, jobs = own(5, 5, 5), make_jobs(10)
    assert_right(answers(make_fleet(process, window=1, max_restarts=1).generate(jobs)), jobs)
    assert process.lives == 3


def test_a_server_of_others_that_comes_back_waits_for_weights(stub: Any, make_fleet: Any) -> None:
    before, jobs = stub(), make_jobs(8)
    servers = make_fleet(before)
    give(servers, "1")
    before.hold = lambda _: True
    generation = servers.generate(jobs)
    wait_for(lambda: before.in_flight == 4)
    before.stop()
    wait_for(lambda: servers.replicas[0].state is State.DOWN)
    assert servers.running() == [] and not servers.wait_for_running(0.05)
    after = StubServer(before.port).start()
    try:
        assert servers.wait_for_running(10.0)
        assert generation.next(timeout=10.0) is None  # says so to whoever waits for answers
        assert generation.next(timeout=0.1) is None and after.asked == []
        assert [control.url for control in servers.stale()] == [after.url]
        give(servers, "1")
        came = answers(generation)
    finally:
        after.stop()
    assert_right(came, jobs)
    assert versions(came) == {"1"} and servers.stale() == []


def test_a_server_of_others_that_stays_away_is_lost(stub: Any, make_fleet: Any) -> None:
    gone, sound, jobs = stub(), stub(), make_jobs(12)
    servers = make_fleet(gone, sound, max_restarts=2, start_timeout=0.1)
    gone.stop()
    assert_right(answers(servers.generate(jobs)), jobs)
    wait_for(lambda: servers.replicas[0].state is State.LOST)


def test_answers_of_other_weights_are_not_taken(stub: Any, make_fleet: Any) -> None:
    """Not even those that come after the server is known to have other weights."""
    other, jobs = stub(), make_jobs(4)
    servers = make_fleet(other)
    give(servers, "1")
    other.hold = lambda body: body["token_ids"][-1] < 40
    early = servers.generate(jobs[:3])
    wait_for(lambda: other.in_flight == 3)
    other.version = "default"  # as after a start by somebody else
    late = servers.generate(jobs[3:])
    wait_for(lambda: len(servers.stale()) == 1)
    other.release()
    wait_for(lambda: other.in_flight == 0)
    wait_for(lambda: not servers.replicas[0].asking)
    give(servers, "1")
    came = answers(early) + answers(late)
    assert_right(came, jobs)
    assert versions(came) == {"1"} and len(other.asked) == 8


def test_a_server_that_is_resumed_without_the_others_leaves_them_stale(stub: Any, make_fleet: Any) -> None:
    one, other, jobs = stub(), stub(), make_jobs(10)
    servers = make_fleet(one, other)
    first = servers.running()[:1]
    servers.pause(first, abort=True).result()
    servers.on_each(first, lambda control: control.finish_weight_update("1"))
    servers.resume(first, "1")
    assert [control.url for control in servers.stale()] == [other.url]
    came = answers(servers.generate(jobs))
    assert_right(came, jobs)
    assert versions(came) == {"1"} and other.asked == []


def test_answers_that_are_aborted_go_on_with_the_new_weights(stub: Any, make_fleet: Any) -> None:
    one, jobs = stub(), make_jobs(6)
    servers = make_fleet(one)
    give(servers, "1")
    one.hold = lambda _: True
    generation = servers.generate(jobs)
    wait_for(lambda: one.in_flight == 4)
    one.hold = lambda _: False
    give(servers, "2")
    came = answers(generation)
    assert_right(came, jobs)
    aborted = [answer for answer in came if answer.prompt_index < 4]
    assert all(answer.weight_versions == (VersionSpan("1", 0, 2), VersionSpan("2", 2, 4)) for answer in aborted)
    again = [body for body in one.asked if len(body["token_ids"]) == 4]
    assert sorted(body["token_ids"] for body in again) == [[1, n, n + 1, n + 2] for n in (10, 20, 30, 40)]
    assert {body["sampling_params"]["max_tokens"] for body in again} == {2} and len(one.asked) == 10


def test_an_answer_that_is_aborted_at_its_last_token_is_complete(stub: Any, make_fleet: Any) -> None:
    one, jobs = stub(), make_jobs(1)
    one.partial, one.hold = 4, lambda _: True
    servers = make_fleet(one)
    generation = servers.generate(jobs)
    wait_for(lambda: one.in_flight == 1)
    give(servers, "1")
    (answer,) = answers(generation)
    assert answer.token_ids == (11, 12, 13, 14) and answer.finish_reason == "length" and len(one.asked) == 1


def test_a_request_that_a_pause_overtakes_does_not_hold_it_up(stub: Any, make_fleet: Any) -> None:
    """It waits in the paused server: for as long as a request may take, were it not aborted as well."""
    one, jobs = stub(), make_jobs(3)
    servers = make_fleet(one)
    one.late = lambda body: body["token_ids"][-1] == 20
    one.hold = lambda _: True
    generation = servers.generate(jobs)
    wait_for(lambda: one.in_flight == 3)
    assert servers.pause(servers.running(), abort=True).result() == {}
    assert one.in_flight == 0
    one.release()
    one.late = lambda _: False
    servers.resume(servers.running(), None)
    assert_right(answers(generation), jobs)


def test_a_pause_that_does_not_abort_waits_for_what_runs(stub: Any, make_fleet: Any) -> None:
    one, jobs = stub(), make_jobs(10)
    one.hold = lambda _: True
    servers = make_fleet(one)
    generation = servers.generate(jobs)
    wait_for(lambda: one.in_flight == 4)
    pausing = servers.pause(servers.running(), abort=False)
    wait_for(lambda: servers.replicas[0].state is State.PAUSED)
    assert not pausing.done() and one.calls == []
    one.release()
    assert pausing.result(10.0) == {} and one.calls == ["/pause?mode=wait&clear_cache=true"]
    came = [generation.next(timeout=10.0) for _ in range(4)]
    assert None not in came and generation.next(timeout=0.1) is None and len(one.asked) == 4
    servers.resume(servers.running(), None)
    assert_right([*came, *answers(generation)], jobs)


def test_what_goes_wrong_with_a_server_is_said_by_its_address(stub: Any, make_fleet: Any) -> None:
    one, other = stub(), stub()
    servers = make_fleet(one, other)
    other.control_status = 400
    troubles = servers.pause(servers.running(), abort=True).result()
    assert list(troubles) == [other.url] and isinstance(troubles[other.url], Refused)
    troubles = servers.on_each(servers.running(), ServerControl.sleep)
    assert list(troubles) == [other.url] and "/sleep?level=2 refused" in str(troubles[other.url])


def test_a_server_that_does_not_resume_is_given_up(stub: Any, make_fleet: Any) -> None:
    one, other, jobs = stub(), stub(), make_jobs(10)
    servers = make_fleet(one, other, max_restarts=0)
    servers.pause(servers.running(), abort=True).result()
    other.control_status = 500
    servers.resume(servers.running(), None)
    assert_right(answers(servers.generate(jobs)), jobs)
    wait_for(lambda: servers.replicas[1].state is State.LOST)
    assert other.asked == []


def test_a_server_that_is_being_started_again_is_not_paused_or_given_up_once_more(stub: Any, make_fleet: Any) -> None:
    gone, jobs = stub(), make_jobs(5)
    servers = make_fleet(gone)
    known = servers.running()
    gone.stop()
    wait_for(lambda: servers.replicas[0].state is State.DOWN)
    troubles = servers.pause(known, abort=True).result()
    assert list(troubles) == [gone.url] and isinstance(troubles[gone.url], Unreachable)
    servers.give_up(known, "a test")
    servers.resume(known, None)
    assert servers.replicas[0].state is State.DOWN and servers.replicas[0].restarts <= 1
    back = StubServer(gone.port).start()
    try:
        assert_right(answers(servers.generate(jobs)), jobs)
    finally:
        back.stop()


def test_jobs_of_a_server_that_is_given_up_as_they_are_handed_out_are_not_lost(stub: Any, make_fleet: Any) -> None:
    one, jobs = stub(), make_jobs(6)
    servers = make_fleet(one)
    generation = Generation(servers, len(jobs))

    async def hand_out_and_give_up() -> None:  # in one go: no request has begun
        await servers._add([_Task(job, generation) for job in jobs], generation)
        await servers._give_up(servers.running(), "a test")

    servers.http.run(hand_out_and_give_up())
    assert_right(answers(generation), jobs)


def test_servers_that_are_given_up_are_started_again(stub: Any, own: Any, make_fleet: Any) -> None:
    one, process, jobs = stub(), own(), make_jobs(10)
    servers = make_fleet(one, process)
    one.fault = always("hang")
    generation = servers.generate(jobs)
    wait_for(lambda: one.in_flight == 4)
    one.fault = lambda _: None
    servers.give_up(servers.running(), "a test")
    assert_right(answers(generation), jobs)
    wait_for(lambda: process.lives == 2)
