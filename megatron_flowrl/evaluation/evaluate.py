"""`megatron-flowrl evaluate`: n answers to each problem of a benchmark, graded as they come, and what they say.

In the output folder, NAME.jsonl has a line an answer, written when it is graded; the same command goes on from there.
summary.json has the numbers of all benchmarks.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any

from megatron_flowrl.config import Config, RewardConfig, UserError
from megatron_flowrl.evaluation.benchmarks import MATH_SIX, Benchmark, Problem, benchmark_of, read_problems
from megatron_flowrl.evaluation.diversity import clusters, distinct_finals, distinct_n, self_bleu
from megatron_flowrl.evaluation.estimates import bootstrap_interval, majority, pass_at_k
from megatron_flowrl.evaluation.rating import Contest, contest_rating, model_rating, read_contest
from megatron_flowrl.evaluation.sources import Source, Wanted
from megatron_flowrl.observe.log import logger, progress
from megatron_flowrl.rewards.grader import Grade, Item
from megatron_flowrl.rewards.pool import GraderPool
from megatron_flowrl.rollout.generation import Sampling

SUMMARY = "summary.json"
_SETTINGS = "settings.json"
_CODE_SECONDS = 120.0


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how. The defaults are the paper's."""

    benchmarks: Sequence[str]
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
    limit: int | None = None
    contests: str | None = None
    """Folder of contests' files, for the rating of `codeforces`."""

    def identity(self) -> dict[str, Any]:
        """What answers depend on: an output folder has those of one only."""
        return {name: value for name, value in asdict(self).items() if name not in ("benchmarks", "data", "contests")}


@dataclass(frozen=True)
class GradedText:
    """A line of an answers' file."""

    id: str
    sample: int
    response: str
    tokens: int
    finish_reason: str
    score: float
    key: str | None
    problem: str | None


def check_plan(plan: Plan) -> dict[str, list[Problem]]:
    """Problems by benchmark. Raises UserError for what can be told before anything is started."""
    unknown = [name for name in plan.data if name not in plan.benchmarks]
    if unknown:
        raise UserError(f"--data names {', '.join(unknown)}, which is not evaluated; leave it out, or name it")
    found = {
        name: read_problems(benchmark_of(name), plan.data.get(name), plan.limit)
        for name in dict.fromkeys(plan.benchmarks)
    }
    for name, problems in found.items():
        _contests_of(plan, name, problems)
    return found


def claim(output: Path, plan: Plan, problems: Mapping[str, Sequence[Problem]]) -> None:
    """Make the folder ours, or see that the answers there are this plan's, to these problems. Raises UserError."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / _SETTINGS
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {**plan.identity(), "problems": {}}
    other = [f"{name} = {there.get(name)!r}" for name, value in plan.identity().items() if there.get(name) != value]
    digests = {name: _digest(some) for name, some in problems.items()}
    known = there["problems"]
    other += [f"other problems of {name}" for name, digest in digests.items() if known.get(name, digest) != digest]
    if other:
        raise UserError(f"{output} has answers of another evaluation ({', '.join(other)}); give another --output")
    settings = {**plan.identity(), "problems": {**known, **digests}}
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _digest(problems: Sequence[Problem]) -> str:
    content = [(problem.id, problem.prompt, problem.ground_truth) for problem in problems]
    return hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def evaluate(
    config: Config, plan: Plan, problems: Mapping[str, Sequence[Problem]], source: Source, output: Path
) -> dict[str, Any]:
    """Answer and grade what is missing, write the summary, and return it; `claim` comes before. Raises UserError."""
    found: dict[str, Any] = {}
    summary: dict[str, Any] = {"plan": asdict(plan), "benchmarks": found}
    for name, some in problems.items():
        benchmark = benchmark_of(name)
        graded = _graded(config, plan, benchmark, some, source, output / f"{name}.jsonl")
        found[name] = summarize(graded, [problem.id for problem in some], config.reward.correct_from)
        contests = _contests_of(plan, name, some)
        if contests:
            found[name] |= _rating(contests, some, graded, config.reward.correct_from)
        if all(one in found for one in MATH_SIX):
            summary["math_six"] = fmean(found[one]["avg"] for one in MATH_SIX)
        (output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def reward_of(config: Config, benchmark: Benchmark) -> RewardConfig:
    """How a benchmark is graded; programs have many tests, and get time for them."""
    seconds = config.reward.timeout_seconds
    if benchmark.grader == "code":
        seconds = max(seconds, _CODE_SECONDS)
    return replace(config.reward, grader=benchmark.grader, timeout_seconds=seconds)


def summarize(answers: Sequence[GradedText], ids: Sequence[str], correct_from: float) -> dict[str, Any]:
    """Numbers over problems, each with an answer of equal number n.

    avg: Avg@n, the share of right answers; pass@k for k = 1, 2, 4 .. n; maj, where the grader knows final answers; a
    95% interval of each over problems (`*_interval`); answers' length in tokens, and the shares that were cut off and
    that could not be graded; `diversity.py`'s measures.
    """
    of: dict[str, list[GradedText]] = defaultdict(list)
    for answer in answers:
        of[answer.id].append(answer)
    groups = [sorted(of[one], key=lambda answer: answer.sample) for one in ids if one in of]
    if not groups:
        return {"problems": 0}
    right = [[answer.score >= correct_from for answer in group] for group in groups]
    n = min(map(len, groups))
    by_problem: dict[str, list[float]] = {"avg": [fmean(group) for group in right]}
    for k in [2**power for power in range(n.bit_length()) if 2**power < n] + [n]:
        by_problem[f"pass@{k}"] = [pass_at_k(len(group), sum(group), k) for group in right]
    keys = [[answer.key for answer in group] for group in groups]
    if any(key is not None for group in keys for key in group):
        by_problem[f"maj@{n}"] = [majority(some, rights) for some, rights in zip(keys, right, strict=True)]
    found: dict[str, Any] = {"problems": len(groups), "n": n}
    for name, values in by_problem.items():
        found[name] = fmean(values)
        found[f"{name}_interval"] = bootstrap_interval(values)
    texts = [[answer.response for answer in group] for group in groups]
    found |= {
        "tokens_mean": fmean(answer.tokens for answer in answers),
        "truncated_share": fmean(answer.finish_reason == "length" for answer in answers),
        "ungraded_share": fmean(answer.problem is not None for answer in answers),
        "distinct_finals": fmean(map(distinct_finals, keys)),
        "distinct_2": fmean(distinct_n(some, 2) for some in texts),
        "clusters": fmean(map(clusters, texts)),
    }
    if n > 1:
        found["self_bleu"] = fmean(map(self_bleu, texts))
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The benchmarks, a line each, as Markdown."""
    lines = ["| | problems | Avg@n | pass@n | maj@n | tokens | cut off |", "| --- |" + " ---: |" * 6]
    for name, of in summary["benchmarks"].items():
        n = of.get("n")
        cells = [str(of["problems"])]
        for measure in ("avg", f"pass@{n}", f"maj@{n}"):
            if measure in of:
                low, high = of[f"{measure}_interval"]
                cells.append(f"{100 * of[measure]:.1f} ({100 * low:.1f} - {100 * high:.1f})")
            else:
                cells.append("")
        cells += [f"{of['tokens_mean']:.0f}", f"{of['truncated_share']:.1%}"] if n else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if "math_six" in summary:
        lines.append(f"| mean of the six | | {100 * summary['math_six']:.1f} | | | | |")
    return "\n".join(lines)


def _graded(
    config: Config, plan: Plan, benchmark: Benchmark, problems: Sequence[Problem], source: Source, file: Path
) -> list[GradedText]:
    place = {problem.id: number for number, problem in enumerate(problems)}
    done = {
        (one.id, one.sample): one for one in read_answers(file, repair=True) if one.id in place and one.sample < plan.n
    }
    wanted = [
        Wanted(number, sample)
        for number, problem in enumerate(problems)
        for sample in range(plan.n)
        if (problem.id, sample) not in done
    ]
    if done:
        logger.info("%s: %d answers are there, %d are missing", benchmark.name, len(done), len(wanted))
    if wanted:
        sampling = Sampling(max_tokens=plan.max_tokens, temperature=plan.temperature, top_p=plan.top_p)
        prompts = [problem.prompt for problem in problems]
        reward = reward_of(config, benchmark)
        with (
            GraderPool(reward) as pool,
            file.open("a", encoding="utf-8") as lines,
            progress(config.logging, 0, len(wanted), benchmark.name) as advance,
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

            try:
                for answer in source.answers(prompts, wanted, sampling):
                    problem = problems[answer.problem]
                    item = Item(answer.text, problem.ground_truth, problem.prompt, problem.row, answer.finish_reason)
                    about = {"id": problem.id, "sample": answer.sample, "response": answer.text}
                    about |= {"tokens": answer.tokens, "finish_reason": answer.finish_reason}
                    if answer.trouble is None:
                        future = pool.submit(item)
                    else:
                        future = Future()
                        future.set_result(Grade(reward.failed_score, None, answer.trouble))
                    asked += 1
                    future.add_done_callback(partial(_put, come, about))
                    write(everything=False)
            finally:  # what has come is kept, also where the source fails, or the user interrupts
                write(everything=True)
    return [done[problem.id, sample] for problem in problems for sample in range(plan.n)]


def read_answers(file: Path, *, repair: bool = False) -> list[GradedText]:
    """Lines of an earlier run. The last may be cut off: with `repair` it is taken off the file, to be written anew."""
    if not file.exists():
        return []
    content = file.read_text(encoding="utf-8")
    whole, _, rest = content.rpartition("\n")
    if rest and repair:
        file.write_text(whole + "\n" if whole else "", encoding="utf-8")
    try:
        return [GradedText(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file} has lines that are none of an evaluation's ({error}); give another --output"
        ) from error


def _put(come: SimpleQueue[Any], about: dict[str, Any], future: Future[Grade]) -> None:
    come.put((about, future))


def _contests_of(plan: Plan, name: str, problems: Sequence[Problem]) -> dict[str, Contest]:
    """The contests that a benchmark's problems are of, if there is to be a rating. Raises UserError."""
    if plan.contests is None or not any("contest" in problem.row for problem in problems):
        return {}
    names = {str(problem.row.get("contest")): problem for problem in problems}
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
    contests: Mapping[str, Contest], problems: Sequence[Problem], answers: Sequence[GradedText], correct_from: float
) -> dict[str, Any]:
    """CodeForces rating: a problem's answers in their order are its attempts."""
    attempts: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        attempts[answer.id].append(answer.score >= correct_from)
    of: dict[str, dict[str, list[bool]]] = defaultdict(dict)
    for problem in problems:
        of[str(problem.row["contest"])][str(problem.row["index"])] = attempts[problem.id]
    ratings = {name: contest_rating(contests[name], some) for name, some in of.items()}
    return {"rating": model_rating([*ratings.values()]), "rating_of_contest": ratings}


__all__ = [
    "SUMMARY",
    "GradedText",
    "Plan",
    "check_plan",
    "claim",
    "evaluate",
    "read_answers",
    "reward_of",
    "summarize",
    "table",
]
