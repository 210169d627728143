"""Worker: a trainer with servers of its own, which are killed in the midst of things.

torchrun ... -m tests.end_to_end.fleet_worker JOB.json: {"case", "model", "settings", "weights": {name: folder},
"prompts", "expected": {name: answers}, "logs", "shared": file}; every check is an assertion.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_flowrl.rollout.generation import Answer, Sampling
from megatron_flowrl.rollout.guard import shared_memory_of
from tests.end_to_end.test_export_in_vllm import processes_with
from tests.end_to_end.trainer import Trainer, trainer

LONG = Sampling(max_tokens=200)


def check_answers(run: Trainer, job: dict[str, Any], name: str) -> None:
    """Greedy answers are those of the weights `name`."""
    answers = run.greedy(job["prompts"])
    assert run.rank != 0 or answers == job["expected"][name], name


def descendants(process: int) -> list[int]:
    """A process's children, theirs, and so on."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def server_processes(url: str) -> list[int]:
    """The processes of a server: the front end, the engine and the workers, without the guard."""
    guard, *_ = sorted(processes_with(url.rpartition(":")[2]))
    return descendants(guard)


def note_shared_memory(run: Trainer, file: Path) -> None:
    """Add what the servers have in /dev/shm now to a file."""
    fleet = run.sampler._fleet
    if fleet is not None:
        processes = [process for server in fleet.running() for process in server_processes(server.url)]
        with file.open("a") as names:
            names.writelines(f"{name}\n" for name in shared_memory_of(processes))


def wait_for(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def both_ways(run: Trainer, job: dict[str, Any]) -> None:
    """Two sets of weights, one after the other."""
    for name in "ABA":
        run.load(Path(job["weights"][name]))
        run.sampler.sync(name)
        check_answers(run, job, name)


def killed_while_answering(run: Trainer, job: dict[str, Any]) -> None:
    """A server is killed with answers under way: all come, by the right weights, and it comes back with them."""
    fleet = run.sampler._fleet
    assert fleet is not None
    run.load(Path(job["weights"]["B"]))
    run.sampler.sync("one")
    seen: list[Answer] = []
    before = {server.url for server in fleet.running()}

    def on_answer(answer: Answer) -> None:
        seen.append(answer)
        if len(seen) == 5:
            for process in server_processes(fleet.replicas[0].url):
                os.kill(process, signal.SIGKILL)

    prompts = job["prompts"] * 8
    answers = run.sampler.generate(prompts, LONG, 2, on_answer)
    assert [(a.prompt_index, a.sample_index) for a in answers] == [(p, s) for p in range(len(prompts)) for s in (0, 1)]
    assert sorted(seen, key=lambda a: (a.prompt_index, a.sample_index)) == answers  # each once
    assert {span.version for answer in answers for span in answer.weight_versions} == {"one"}
    assert all(len(answer.token_ids) == LONG.max_tokens == len(answer.log_probs) for answer in answers)
    # It was started again on another port, and takes part once it has the weights.
    wait_for(lambda: len(fleet.stale()) == 1)
    run.sampler.generate(job["prompts"], LONG, 2)
    assert not fleet.stale() and {server.url for server in fleet.running()} != before
    check_answers(run, job, "B")


def engine_hangs(run: Trainer, job: dict[str, Any]) -> None:
    """Its front end says that it is well; no token comes, so the server is ended, and the answers come all the same."""
    fleet = run.sampler._fleet
    assert fleet is not None
    engine = next(p for p in server_processes(fleet.replicas[0].url) if b"spawn_main" in command_of(p))  # the first
    os.kill(engine, signal.SIGSTOP)
    began = time.monotonic()
    answers = run.sampler.generate(job["prompts"] * 8, LONG, 2)
    assert len(answers) == len(job["prompts"]) * 16 and 10 < time.monotonic() - began < 120
    assert {span.version for answer in answers for span in answer.weight_versions} == {"one"}
    wait_for(lambda: len(fleet.stale()) == 1)
    run.sampler.generate(job["prompts"], LONG, 2)
    assert not fleet.stale()


def command_of(process: int) -> bytes:
    """Its command line."""
    return Path(f"/proc/{process}/cmdline").read_bytes()


def killed_while_updating(run: Trainer, job: dict[str, Any]) -> None:
    """A server hangs in a transfer and is killed: the other has the new weights, and this one when it is back."""
    fleet = run.sampler._fleet
    assert fleet is not None
    victims = server_processes(fleet.replicas[1].url)
    for process in victims:
        os.kill(process, signal.SIGSTOP)

    def kill() -> None:
        for process in victims:
            os.kill(process, signal.SIGKILL)

    timer = threading.Timer(2.0, kill)
    timer.start()
    run.load(Path(job["weights"]["A"]))
    began = time.monotonic()
    report = run.sampler.sync("two")
    assert time.monotonic() - began < 60 and report.servers == 1
    timer.join()
    check_answers(run, job, "A")
    wait_for(lambda: len(fleet.stale()) == 1)
    assert run.sampler.sync("three").servers == 2
    for _ in range(2):  # two at a time, so that both are asked
        answers = run.answers([prompt for prompt in job["prompts"] for _ in range(2)])
        assert {answer.url for answer in answers} == {server.url for server in fleet.running()}
    check_answers(run, job, "A")


def aborted_by_an_update(run: Trainer, job: dict[str, Any]) -> None:
    """New weights come while answers are being sampled: these go on from where they were."""
    run.load(Path(job["weights"]["B"]))  # before, so that the update comes at once
    pending = run.sampler.begin(job["prompts"] * 16, LONG, 2)
    fleet = run.sampler._fleet
    assert fleet is not None
    wait_for(lambda: any(replica.asking for replica in fleet.replicas))
    run.sampler.sync("four")
    answers = run.sampler.finish(pending)
    assert len(answers) == len(job["prompts"]) * 32
    for answer in answers:
        assert len(answer.token_ids) == LONG.max_tokens and answer.finish_reason == "length"
        assert [s.version for s in answer.weight_versions] in (["three"], ["three", "four"], ["four"])
        edges = [0, *(span.stop for span in answer.weight_versions)]
        assert [span.start for span in answer.weight_versions] == edges[:-1] and edges[-1] == LONG.max_tokens
    assert any(len(answer.weight_versions) == 2 for answer in answers)
    check_answers(run, job, "B")


CASES: dict[str, list[Callable[[Trainer, dict[str, Any]], None]]] = {
    "both_ways": [both_ways],
    "killed": [killed_while_answering, engine_hangs, killed_while_updating, aborted_by_an_update],
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    with trainer(Path(job["weights"]["A"]), Path(job["logs"]), job["settings"]) as run:
        for case in CASES[job["case"]]:
            note_shared_memory(run, Path(job["shared"]))
            case(run, job)
        note_shared_memory(run, Path(job["shared"]))


if __name__ == "__main__":
    main()
