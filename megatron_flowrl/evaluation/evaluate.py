"""`megatron-flowrl evaluate`: n answers to each problem of a benchmark, graded as they come, and what they say.

In the output folder, NAME.jsonl has a line an answer, written when it is graded; the same command goes on from there.
summary.json has the numbers of all benchmarks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any

from megatron_flowrl.config import Config, RewardConfig, UserError
from megatron_flowrl.evaluation.benchmarks import (
    MATH_SIX,
    WHOLE,
    Benchmark,
    Part,
    Problem,
    benchmark_of,
    is_file,
    own_benchmark,
    read_problems,
)
from megatron_flowrl.evaluation.rating import (
    Contest,
    contest_rating,
    model_rating,
    percentile,
    read_contest,
    read_ratings,
)
from megatron_flowrl.evaluation.results import REFUSED, SUMMARY, GradedText, read_answers, summarize
from megatron_flowrl.evaluation.sources import Source, Wanted, Written
from megatron_flowrl.observe.log import logger, progress
from megatron_flowrl.platform.atomic import write_file
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import GraderPool
from megatron_flowrl.rollout.generation import Sampling

_SETTINGS = "settings.json"
_CODE_SECONDS = 600.0  # of an answer; a test of it has reward.code.wall_seconds


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how. The defaults are the paper's."""

    benchmarks: Sequence[str]
    """Names, or files of one's own."""

    data: Mapping[str, str]
    """Benchmark -> file; the others are read from the hub."""

    model: str
    """What answers: a server's name for it, or the folder that is read, a checkpoint's own."""

    chat: bool = True
    """Whether a chat template is put around prompts."""

    n: int = 16
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 8192
    part: Part = WHOLE
    template: str | None = None
    """Of a file that is no benchmark: text around {problem}."""

    contests: str | None = None
    """Folder of contests' files, for the rating of `codeforces`."""

    def identity(self) -> dict[str, Any]:
        """What answers depend on, beside problems and graders: an output folder has those of one only."""
        names = ("model", "chat", "n", "temperature", "top_p", "max_tokens")
        return {name: value for name, value in asdict(self).items() if name in names}


Problems = Mapping[Benchmark, Sequence[Problem]]


def check_plan(plan: Plan, reward: RewardConfig) -> dict[Benchmark, list[Problem]]:
    """The benchmarks and their problems; `reward.grader` is that of files that are none.

    Raises UserError for what can be told before anything is started.
    """
    unknown = [name for name in plan.data if name not in plan.benchmarks]
    if unknown:
        raise UserError(f"--data names {', '.join(unknown)}, which is not evaluated; leave it out, or name it")
    benchmarks = [
        own_benchmark(name, reward.grader, plan.template) if is_file(name) else benchmark_of(name)
        for name in dict.fromkeys(plan.benchmarks)
    ]
    if plan.template is not None and not any(map(is_file, plan.benchmarks)):
        raise UserError("--template is for a file of yours, and none is evaluated; leave it out")
    names = Counter(benchmark.name for benchmark in benchmarks)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"two of what is to be evaluated would be called {twice[0]}; rename a file")
    found = {one: read_problems(one, plan.data.get(one.name), plan.part) for one in benchmarks}
    for benchmark, problems in found.items():
        by_test = benchmark.grader == "code" and any("test" in problem.ground_truth for problem in problems)
        if by_test and reward.code.server is not None:
            raise UserError(
                f"{benchmark.name}'s tests are code, which reward.code.server cannot run apart from the answer: leave "
                "the server out, and they run in a jail here"
            )
    rated = [_contests_of(plan, benchmark.name, problems) for benchmark, problems in found.items()]
    if plan.contests is not None:
        if not any(rated):
            raise UserError("--contests is given, and no problem has a contest; leave it out, or name codeforces")
        read_ratings(plan.contests)
    return found


def check_folder(output: Path, plan: Plan, config: Config, problems: Problems) -> None:
    """See that answers in the folder, if there are any, are this plan's to these problems. Raises UserError."""
    there = _settings_of(output)
    if not there or not _has_answers(output):
        return
    ours = plan.identity() | _source_settings(config)
    other = [f"{name} = {there.get(name)!r}" for name, value in ours.items() if there.get(name) != value]
    known = there["problems"]
    digests = _digests(config, problems)
    other += [f"other problems of {name}" for name, one in digests.items() if known.get(name, one)[0] != one[0]]
    other += [f"another grading of {name}" for name, one in digests.items() if known.get(name, one)[1] != one[1]]
    if other:
        raise UserError(f"{output} has answers of another evaluation ({', '.join(other)}); give another --output")


def claim(output: Path, plan: Plan, config: Config, problems: Problems) -> None:
    """Make the folder this plan's; `check_folder` comes before, and all that might fail between."""
    output.mkdir(parents=True, exist_ok=True)
    known = _settings_of(output).get("problems", {}) if _has_answers(output) else {}
    settings = plan.identity() | _source_settings(config) | {"problems": {**known, **_digests(config, problems)}}
    write_file(output / _SETTINGS, json.dumps(settings, indent=2) + "\n")


def _has_answers(output: Path) -> bool:
    return any(file.stat().st_size for file in output.glob("*.jsonl"))


def _settings_of(output: Path) -> dict[str, Any]:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    file = output / _SETTINGS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found["problems"], dict):
            raise TypeError("problems is no object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}); give another --output") from error
    return dict(found)


def _source_settings(config: Config) -> dict[str, Any]:
    return {"tokenizer": config.data.tokenizer, "dtype": config.rollout.dtype}


def _digests(config: Config, problems: Problems) -> dict[str, list[str]]:
    """Of each benchmark, of its problems and of how they are graded."""
    found = {}
    for benchmark, some in problems.items():
        content, grading = hashlib.sha256(), asdict(reward_of(config, benchmark))
        for problem in some:
            content.update(repr((problem.id, problem.prompt, problem.ground_truth)).encode("utf-8", "surrogatepass"))
        for name in ("workers", "timeout_seconds"):
            del grading[name]
        found[benchmark.name] = [
            content.hexdigest()[:16],
            hashlib.sha256(json.dumps(grading, sort_keys=True, default=str).encode()).hexdigest()[:16],
        ]
    return found


def evaluate(config: Config, plan: Plan, problems: Problems, source: Source, output: Path) -> dict[str, Any]:
    """Answer and grade what is missing, write the summary, and return it; `claim` comes before. Raises UserError.

    What the folder's summary has of other benchmarks, which are of the same settings, stays in it.
    """
    found = {name: of for name, of in _benchmarks_of(output / SUMMARY).items() if (output / f"{name}.jsonl").exists()}
    summary: dict[str, Any] = {"plan": asdict(plan), "benchmarks": found}
    for benchmark, some in problems.items():
        name = benchmark.name
        graded = _graded(config, plan, benchmark, some, source, output / f"{name}.jsonl")
        found[name] = summarize(graded, [problem.id for problem in some], config.reward.correct_from)
        contests = _contests_of(plan, name, some)
        if contests:
            humans = read_ratings(plan.contests)
            found[name] |= _rating(contests, humans, some, graded, config.reward.correct_from)
        if all(one in found for one in MATH_SIX):
            summary["math_six"] = fmean(found[one]["avg"] for one in MATH_SIX)
        write_file(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
        if found[name]["ungraded_share"]:
            share = found[name]["ungraded_share"]
            logger.warning("%s: %.1f%% of the answers could not be graded, and count as wrong", name, 100 * share)
    return summary


def _benchmarks_of(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # nothing is lost with it: it is made of the answers
    return dict(found) if isinstance(found, dict) else {}


def reward_of(config: Config, benchmark: Benchmark) -> RewardConfig:
    """How a benchmark is graded; programs have many tests, and get time for them."""
    if benchmark.grader != "code":
        return replace(config.reward, grader=benchmark.grader)
    code = config.reward.code
    packages = code.packages if code.server is not None else (*code.packages, *benchmark.packages)
    return replace(
        config.reward,
        grader=benchmark.grader,
        timeout_seconds=max(config.reward.timeout_seconds, _CODE_SECONDS),
        code=replace(code, packages=packages),
    )


def _graded(
    config: Config, plan: Plan, benchmark: Benchmark, problems: Sequence[Problem], source: Source, file: Path
) -> list[GradedText]:
    place = {problem.id: number for number, problem in enumerate(problems)}
    kept = {
        (one.id, one.sample): one for one in read_answers(file, repair=True) if one.id in place and one.sample < plan.n
    }
    done = {where: one for where, one in kept.items() if one.problem is None}
    again = [one for where, one in kept.items() if where not in done and one.finish_reason != REFUSED]
    wanted = [
        Wanted(number, sample)
        for number, problem in enumerate(problems)
        for sample in range(plan.n)
        if (problem.id, sample) not in done and (problem.id, sample) not in {(one.id, one.sample) for one in again}
    ]
    if kept:
        logger.info("%s: %d answers are there, %d are missing", benchmark.name, len(done), len(wanted))
    if again:
        logger.info("%s: %d answers could not be graded, which is tried again", benchmark.name, len(again))
    if wanted or again:
        sampling = Sampling(max_tokens=plan.max_tokens, temperature=plan.temperature, top_p=plan.top_p)
        prompts = [problem.prompt for problem in problems]
        reward = reward_of(config, benchmark)
        with (
            GraderPool(reward) as pool,
            file.open("a", encoding="utf-8") as lines,
            progress(config.logging, 0, len(wanted) + len(again), benchmark.name) as advance,
        ):
            come: SimpleQueue[tuple[dict[str, Any], Future[Grade]]] = SimpleQueue()
            asked = 0

            def write(everything: bool) -> None:
                nonlocal asked
                while asked and (everything or not come.empty()):
                    about, future = come.get()
                    asked -= 1
                    grade = future.result()
                    one = GradedText(**about, score=grade.score, key=grade.key, problem=grade.problem)
                    lines.write(json.dumps(asdict(one)) + "\n")
                    lines.flush()
                    done[one.id, one.sample] = one
                    advance()

            def grade(problem: Problem, answer: Written, trouble: str | None) -> None:
                nonlocal asked
                about = {"id": problem.id, "sample": answer.sample, "response": answer.text}
                about |= {"tokens": answer.tokens, "finish_reason": REFUSED if trouble else answer.finish_reason}
                if trouble is None:
                    item = Item(answer.text, problem.ground_truth, problem.prompt, problem.row, answer.finish_reason)
                    future = pool.submit(item)
                else:
                    future = Future()
                    future.set_result(Grade(reward.failed_score, None, trouble))
                asked += 1
                future.add_done_callback(partial(_put, come, about))
                write(everything=False)

            try:
                for one in again:
                    number = place[one.id]
                    old = Written(number, one.sample, one.response, one.tokens, one.finish_reason)
                    grade(problems[number], old, None)
                for answer in source.answers(prompts, wanted, sampling) if wanted else ():
                    grade(problems[answer.problem], answer, answer.trouble)
            finally:  # what has come is kept, also where the source fails, or the user interrupts
                write(everything=True)
    return [done[problem.id, sample] for problem in problems for sample in range(plan.n)]


def _put(come: SimpleQueue[Any], about: dict[str, Any], future: Future[Grade]) -> None:
    come.put((about, future))


def _contests_of(plan: Plan, name: str, problems: Sequence[Problem]) -> dict[str, Contest]:
    """The contests that a benchmark's problems are of, if there is to be a rating. Raises UserError."""
    if plan.contests is None or not any("contest" in problem.row for problem in problems):
        return {}
    names = {str(problem.row.get("contest")) for problem in problems}
    bad = [problem.id for problem in problems if "contest" not in problem.row or "index" not in problem.row]
    if bad:
        raise UserError(f"{name}: the problem {bad[0]!r} has no contest and index, which --contests needs of each")
    contests = {one: read_contest(Path(plan.contests) / f"{one}.json") for one in names}
    for problem in problems:
        contest = contests[str(problem.row["contest"])]
        if str(problem.row["index"]) not in contest.problems:
            raise UserError(f"{name}: contest {contest.name} has no problem {problem.row['index']!r}")
    return contests


def _rating(
    contests: Mapping[str, Contest],
    humans: Sequence[float],
    problems: Sequence[Problem],
    answers: Sequence[GradedText],
    correct_from: float,
) -> dict[str, Any]:
    """CodeForces rating: a problem's answers in their order are its attempts. And of these humans, who are below."""
    attempts: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        attempts[answer.id].append(answer.score >= correct_from)
    of: dict[str, dict[str, list[bool]]] = defaultdict(dict)
    for problem in problems:
        of[str(problem.row["contest"])][str(problem.row["index"])] = attempts[problem.id]
    ratings = {name: contest_rating(contests[name], some) for name, some in of.items()}
    missing = sum(len(contests[name].problems) - len(some) for name, some in of.items())
    if missing:
        logger.warning(
            "%d problems of the rated contests were not asked: the rating counts them as not solved", missing
        )
    rating = model_rating([*ratings.values()])
    found: dict[str, Any] = {"rating": rating, "rating_of_contest": ratings, "rating_not_asked": missing}
    if humans:
        found["percentile"] = percentile(rating, humans)
    return found


__all__ = ["Plan", "check_plan", "claim", "evaluate", "reward_of"]
