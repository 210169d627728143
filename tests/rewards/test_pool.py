"""A pool of grading processes: order, futures, settings, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from megatron_flowrl.config import RewardConfig, UserError
from megatron_flowrl.rewards.frames import decode_grade, encode_item
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import GraderPool
from megatron_flowrl.rewards.process import GradingProcess, TimeLimit

from .conftest import BY_WORD, children_of, until, until_gone


def pool(**settings: Any) -> GraderPool:
    return GraderPool(RewardConfig(**{"grader": BY_WORD, "workers": 1, "timeout_seconds": 60.0, **settings}))


def words(*responses: str) -> list[Item]:
    return [Item(response, None) for response in responses]


def test_grades_come_in_the_order_of_the_items_whatever_is_finished_first(tmp_path: Path) -> None:
    gate, finished = tmp_path / "gate", []
    with pool(workers=2) as graders:
        first = graders.submit(Item("wait", None, row={"file": str(gate)}))
        rest = [graders.submit(item) for item in words(*(f"score {number}" for number in range(40)))]
        for number, future in enumerate([first, *rest]):
            future.add_done_callback(lambda _, number=number: finished.append(number))  # type: ignore[misc]
        assert [future.result().score for future in rest] == list(range(40))
        assert not first.done()
        gate.touch()
        assert first.result() == Grade(1.0)
        assert finished[-1] == 0
        assert graders.grade(words("score 3", "score 1", "score 2")) == [Grade(3.0), Grade(1.0), Grade(2.0)]
        assert graders.graded == 44 and graders.problems == {}


def test_submitting_returns_at_once_and_an_event_loop_goes_on(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def grade_and_count(graders: GraderPool) -> tuple[Grade, int]:
        grade = asyncio.wrap_future(graders.submit(Item("wait", None, row={"file": str(gate)})))
        turns = 0
        while not grade.done():
            turns += 1
            if turns == 1000:
                gate.touch()
            await asyncio.sleep(0)
        return await grade, turns

    with pool() as graders:
        grade, turns = asyncio.run(grade_and_count(graders))
    assert grade == Grade(1.0) and turns >= 1000


def test_the_callers_thread_completes_no_future() -> None:
    with pool() as graders:
        where: Future[int] = Future()
        graders.submit(Item("pid", None)).add_done_callback(lambda _: where.set_result(threading.get_ident()))
        assert where.result(60) != threading.get_ident()


def test_a_callback_may_submit() -> None:
    with pool() as graders:
        second: Future[Future[Grade]] = Future()
        first = graders.submit(Item("score 1", None))
        first.add_done_callback(lambda _: second.set_result(graders.submit(Item("score 2", None))))
        assert second.result(60).result(60) == Grade(2.0)


def test_a_grader_gets_the_whole_item() -> None:
    row = {"a": [1, {"b": None}], "c": "\0"}
    grader = "tests.rewards.test_pool.echo"
    item = Item("response \ud800", ("x", 1), "prompt", row, "length")
    with pool(grader=grader) as graders:
        (grade,) = graders.grade([item])
    assert grade.key is not None and json.loads(grade.key) == json.loads(str(echo([item])[0].key))


def echo(items: list[Item]) -> list[Grade]:
    return [
        Grade(0.0, json.dumps([one.response, one.ground_truth, one.prompt, one.row, one.finish_reason]))
        for one in items
    ]


def test_large_texts_and_zero_bytes_pass() -> None:
    with pool(grader="tests.rewards.graders.lengths") as graders:
        texts = ["\0" * 10_000_000, "\0", "", "ä" * 10_000_000, *["x" * 300_000] * 40]
        assert [grade.score for grade in graders.grade(words(*texts))] == [len(text) for text in texts]


def test_a_long_key_is_cut() -> None:
    with pool() as graders:
        (grade,) = graders.grade(words("key"))
    assert grade.key is not None and len(grade.key) < 200


def test_a_process_is_replaced_after_its_share_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_flowrl.rewards.pool._ITEMS_OF_A_PROCESS", 2)
    with pool() as graders:
        keys = [graders.grade(words("pid"))[0].key for _ in range(6)]
        assert len(set(keys)) == 3 and graders.problems == {}


def test_a_grade_that_has_come_is_taken_however_late_it_is_looked_at() -> None:
    reader, writer = os.pipe()
    process = GradingProcess(RewardConfig(grader=BY_WORD), reader)
    try:
        process.wait_until_ready()
        process.send(encode_item(Item("score 1", None)))
        process._write()  # what is sent goes out while one waits
        until(lambda: not process.idle())
        assert decode_grade(process.receive(0.0)) == Grade(1.0)
        with pytest.raises(TimeLimit):
            process.receive(0.0)
    finally:
        process.end()
        os.close(reader)
        os.close(writer)


def test_a_row_may_be_any_mapping() -> None:
    with pool() as graders:
        assert graders.grade([Item("score 1", None, row=MappingProxyType({"a": 1}))]) == [Grade(1.0)]


def test_what_cannot_be_pickled_is_a_problem_of_its_item() -> None:
    with pool() as graders:
        bad, good = graders.grade([Item("score 1", threading.Lock()), Item("score 1", None)])
    assert bad.problem is not None and "pickle" in bad.problem and good == Grade(1.0)


@pytest.mark.parametrize(("correct_from", "scores"), [(1.0, [1.0, 0.0, 1.0, -7.0]), (0.05, [1.0, 1.0, 1.0, -7.0])])
def test_binary_rewards(correct_from: float, scores: list[float]) -> None:
    with pool(binary=True, correct_from=correct_from, failed_score=-7.0) as graders:
        grades = graders.grade(words("score Grade(1.0, 'key')", "score 0.05", "score 2", "raise"))
    assert [grade.score for grade in grades] == scores and grades[0].key == "key"


def test_scores_that_are_not_binary_stay() -> None:
    with pool() as graders:
        assert [grade.score for grade in graders.grade(words("score 0.05", "score -3"))] == [0.05, -3.0]


@pytest.mark.parametrize(
    ("grader", "response", "problem", "kind"),
    [
        (BY_WORD, "raise", "IndexError: pop from empty list", "IndexError"),
        (BY_WORD, "sysexit", "SystemExit: enough", "SystemExit"),
        (BY_WORD, "score float('nan')", "score: nan is not a finite number", "score"),
        (BY_WORD, "score Grade(5.0, problem='no idea: none')", "no idea: none", "no idea"),
        (
            "tests.rewards.graders.wrong_number",
            "",
            "ValueError: the grader returned 2 scores for 1 items",
            "ValueError",
        ),
        ("tests.rewards.graders.no_sequence", "", "ValueError: the grader returned 1.0, not a sequence", "ValueError"),
    ],
)
def test_what_a_grader_does_wrong_costs_its_item_only(grader: str, response: str, problem: str, kind: str) -> None:
    with pool(grader=grader, failed_score=-1.0) as graders:
        (grade,) = graders.grade(words(response))
        assert grade.score == -1.0 and grade.problem is not None and grade.problem.startswith(problem)
        assert graders.problems == {kind: 1} and graders.graded == 1


def test_the_standard_output_stays_clean(capfd: pytest.CaptureFixture[str]) -> None:
    with pool() as graders:
        assert graders.grade(words("print", "score 1")) == [Grade(1.0), Grade(1.0)]
    captured = capfd.readouterr()
    assert captured.out == "" and "noise" in captured.err


def test_grading_processes_import_neither_torch_nor_megatron() -> None:
    with pool(grader="tests.rewards.graders.math_and_modules") as graders:
        assert graders.grade(words("")) == [Grade(0.0)]


def test_an_interrupt_does_not_reach_the_processes() -> None:
    with pool() as graders:
        before = graders.grade(words("pid"))
        for process in children_of(os.getpid()):
            os.kill(process, signal.SIGINT)
        assert graders.grade(words("pid")) == before


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    before, files = set(children_of(os.getpid())), len(os.listdir("/proc/self/fd"))
    graders = pool(workers=2)
    hanging = graders.submit(Item("family", None, row={"file": str(tmp_path / "family")}))
    until((tmp_path / "family").exists)
    family = json.loads((tmp_path / "family").read_text())
    waiting = [graders.submit(item) for item in words("hang", "score 1")]
    graders.close()
    assert set(children_of(os.getpid())) <= before  # of which some, of tests before, may have ended meanwhile
    until_gone(family)
    assert len(os.listdir("/proc/self/fd")) == files
    assert not any(thread.name.startswith("grader ") for thread in threading.enumerate())
    for future in (hanging, *waiting):
        with pytest.raises(CancelledError):
            future.result(60)
    graders.close()
    with pytest.raises(RuntimeError, match="closed"):
        graders.submit(Item("score 1", None))


def test_a_cancelled_item_is_not_graded(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with pool() as graders:
        first = graders.submit(Item("wait", None, row={"file": str(gate)}))
        second = graders.submit(Item("exit", None))
        assert second.cancel()
        gate.touch()
        assert first.result() == Grade(1.0)
        assert graders.grade(words("score 1")) == [Grade(1.0)]
        assert graders.graded == 2


def test_a_grader_that_cannot_be_imported_is_refused_at_the_start() -> None:
    before = children_of(os.getpid())
    with pytest.raises(UserError, match="did you mean 'by_word'"):
        pool(grader="tests.rewards.graders.by_wort", workers=2)
    assert children_of(os.getpid()) == before


def test_processes_that_do_not_start_end_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fatal = tmp_path / "fatal"
    monkeypatch.setenv("FATAL_IMPORT", str(fatal))
    with pool() as graders:
        assert graders.grade(words("score 1")) == [Grade(1.0)]
        fatal.touch()
        crash, after = (graders.submit(item) for item in words("exit", "score 1"))
        assert crash.result(60).problem == "crash: exit status 3"
        with pytest.raises(UserError, match=r"3 processes in a row did not start, the last one: exit status 7"):
            after.result(60)
        with pytest.raises(UserError, match="3 processes in a row"):
            graders.submit(Item("score 1", None))
    with pytest.raises(UserError, match="3 processes in a row"):
        pool(workers=2)
