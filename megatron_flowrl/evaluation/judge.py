"""`megatron-flowrl judge`: how different the ways of solving are, by a model's judgement.

As in the FlowRL paper, a judge sees all answers to a problem and gives 1 (all solve it the same way) to 5 (each in its
own way). It sees them whole: answers that are cut off in the middle would look like one another. What it says is kept;
where it gives no score the problem is counted as not judged, and is in no mean. Where the server fails, what was judged
is kept, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.evaluation.estimates import bootstrap_interval
from megatron_flowrl.evaluation.results import GradedText, read_answers, whole_lines
from megatron_flowrl.evaluation.sources import Source, Wanted
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rollout.generation import Sampling

_TEMPLATE = """Below are {count} answers to the same problem, by the same author. Judge how different their ways of
solving it are. What counts is the idea: which facts, constructions or algorithms are used, and in which order. Wording,
length, layout, variable names and slips in arithmetic do not count; neither does whether an answer is right.

1: all go the same way
2: most go the same way, with small deviations
3: two or three ways
4: many ways, and some of them more than once
5: nearly every answer has a way of its own

Think about it, naming the ways that you see. Then end with a line of this form alone:
Score: N

{answers}"""
_SCORE = re.compile(r"^\W*score\W*([1-5])(?:\s*/\s*5)?\W*$", re.IGNORECASE | re.MULTILINE)
_LONGEST_VERDICT = 4096


@dataclass(frozen=True)
class Verdict:
    """A line of a judge's file. `answers`: a digest of those that were judged."""

    id: str
    score: int | None
    said: str
    judge: str
    answers: str


def judge(file: Path, source: Source, model: str) -> dict[str, Any]:
    """Have every problem of an answers' file judged that is not yet, by a server's `model`; returns the numbers.

    Raises UserError.
    """
    answers = _by_problem(file)
    if not answers:
        raise UserError(f"{file} has no answers; megatron-flowrl evaluate writes such files")
    output = judged_file(file)
    judged = {verdict.id: verdict.score for verdict in _read(output, answers, repair=True) if verdict.judge == model}
    missing = [one for one in answers if judged.get(one) is None]
    if missing:
        prompts = [prompt_of(answers[one]) for one in missing]
        sampling = Sampling(max_tokens=_LONGEST_VERDICT, temperature=0.0)
        wanted = [Wanted(number, 0) for number in range(len(missing))]
        with output.open("a", encoding="utf-8") as lines:
            for said in source.answers(prompts, wanted, sampling):
                name, text = missing[said.problem], said.trouble or said.text
                verdict = Verdict(name, score_of(said.text), text, model, _digest(answers[name]))
                lines.write(json.dumps(asdict(verdict)) + "\n")
                lines.flush()
                judged[name] = verdict.score
    return summary_of({one: judged.get(one) for one in answers})


def judged_numbers(file: Path) -> dict[str, Any]:
    """Of what has been said of a file's answers by the judge who spoke last, as `judge` returns it."""
    answers = _by_problem(file)
    verdicts = _read(judged_file(file), answers, repair=False)
    last = verdicts[-1].judge if verdicts else ""
    return summary_of({verdict.id: verdict.score for verdict in verdicts if verdict.judge == last})


def judged_file(answers: Path) -> Path:
    """Where what the judge said of these answers is kept."""
    return answers.with_suffix(f".judged{answers.suffix}")


def _by_problem(file: Path) -> dict[str, list[GradedText]]:
    of: dict[str, list[GradedText]] = defaultdict(list)
    for answer in read_answers(file):
        of[answer.id].append(answer)
    return {name: sorted(some, key=lambda answer: answer.sample) for name, some in of.items()}


def _digest(answers: Sequence[GradedText]) -> str:
    texts = repr([answer.response for answer in answers])
    return hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_of(answers: Sequence[GradedText]) -> str:
    """What the judge is asked."""
    texts = "\n\n".join(f"=== Answer {number} ===\n{answer.response}" for number, answer in enumerate(answers, start=1))
    return _TEMPLATE.format(count=len(answers), answers=texts)


def score_of(said: str) -> int | None:
    """The last score on a line of its own; None where there is none."""
    found = _SCORE.findall(said)
    return int(found[-1]) if found else None


def summary_of(scores: Mapping[str, int | None]) -> dict[str, Any]:
    """Mean and 95% interval over the problems that have a score, and how many have none."""
    given = [float(score) for score in scores.values() if score is not None]
    failed = len(scores) - len(given)
    if failed:
        logger.warning("%d of %d problems were not judged: no score in what the judge said", failed, len(scores))
    mean = fmean(given) if given else None
    interval = bootstrap_interval(given) if given else None
    return {"judged": len(given), "not_judged": failed, "diversity": mean, "interval": interval}


def _read(file: Path, answers: Mapping[str, Sequence[GradedText]], *, repair: bool) -> list[Verdict]:
    """What was said of these answers; what was said of others, when the problems had those, is passed over."""
    if not file.exists():
        return []
    found = []
    try:
        for line in whole_lines(file, repair=repair):
            found.append(Verdict(**json.loads(line)))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} has lines that are none of a judge's ({error}); move it away") from error
    digests = {name: _digest(some) for name, some in answers.items()}
    return [verdict for verdict in found if digests.get(verdict.id) == verdict.answers]


__all__ = ["Verdict", "judge", "judged_file", "judged_numbers", "prompt_of", "score_of", "summary_of"]
