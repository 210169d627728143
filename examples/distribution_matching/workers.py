"""Runs in two processes at a time, with a bar of what is done and the time that is left."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from tqdm import tqdm

from examples.distribution_matching.methods import SCHEDULES, Schedule
from examples.distribution_matching.tasks import TASKS

_done: Any = None  # in a worker: the count of work done that all workers share


def _weight(task: str) -> int:
    """What a step costs, about: a part for any step, and one for its tokens."""
    return 500 + len(TASKS[task].prompts) * SCHEDULES[task].samples * (TASKS[task].longest + 1)


def _prepare_worker(done: Any) -> None:
    global _done
    _done = done
    warnings.filterwarnings("ignore")  # what Megatron-Core says when it is imported without Transformer Engine
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # however it ends
    os._exit(1)


def _run_one(task: str, name: str, schedule: Schedule, seed: int) -> Any:
    from examples.distribution_matching.train import train

    def advance() -> None:
        with _done.get_lock():
            _done.value += _weight(task)

    return train(TASKS[task], name, schedule, seed, advance)


def run_all(runs: list[tuple[str, str]], schedules: dict[str, Schedule], seed: int) -> dict[tuple[str, str], Any]:
    """Outcomes by task and method: two processes, the longest runs first."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers: on tensors this small threads wait for one another
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    cost = {run: _weight(run[0]) * schedules[run[0]].steps for run in runs}
    outcomes = {}
    with (
        ProcessPoolExecutor(2, mp_context=context, initializer=_prepare_worker, initargs=(done,)) as pool,
        tqdm(total=sum(cost.values()), bar_format="{percentage:3.0f}%|{bar}| {remaining} left{postfix}", disable=None)
        as bar,
    ):  # fmt: skip
        waiting: dict[Future[Any], tuple[str, str]] = {
            pool.submit(_run_one, *run, schedules[run[0]], seed): run for run in sorted(runs, key=lambda r: -cost[r])
        }
        while waiting:
            finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(done.value - bar.n)
            for future in finished:
                task, name = run = waiting.pop(future)
                outcomes[run] = outcome = future.result()
                kl = outcome.figures["kl_target_policy"]
                bar.write(f"{task:12} {name:20} KL(target || policy) {kl:8.4f}   {outcome.seconds:4.0f} s")
    return outcomes
