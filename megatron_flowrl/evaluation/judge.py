"""`megatron-flowrl judge`: how different the ways of solving are, by a model's judgement.

As in the FlowRL paper, a judge sees all answers to a problem and gives 1 (all solve it the same way) to 5 (each in its
own way). It sees them whole: answers that are cut off in the middle would look like one another. What it says is kept;
where it gives no score the problem is counted as not judged, and is in no mean. Where the server fails, what was judged
is kept, and the same command goes on.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.evaluation.estimates import bootstrap_interval
from megatron_flowrl.evaluation.results import GradedText, read_answers
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


def judge(file: Path, source: Source, output: Path) -> dict[str, Any]:
    """Have every problem of an answers' file judged that is not yet; returns the numbers. Raises UserError."""
    of: dict[str, list[GradedText]] = defaultdict(list)
    for answer in read_answers(file):
        of[answer.id].append(answer)
    if not of:
        raise UserError(f"{file} has no answers; megatron-flowrl evaluate writes such files")
    judged = _read(output)
    missing = [one for one in of if one not in judged]
    if missing:
        prompts = [prompt_of(sorted(of[one], key=lambda answer: answer.sample)) for one in missing]
        sampling = Sampling(max_tokens=_LONGEST_VERDICT, temperature=0.0)
        wanted = [Wanted(number, 0) for number in range(len(missing))]
        with output.open("a", encoding="utf-8") as lines:
            for said in source.answers(prompts, wanted, sampling):
                name, score = missing[said.problem], score_of(said.text)
                lines.write(json.dumps({"id": name, "score": score, "said": said.trouble or said.text}) + "\n")
                lines.flush()
                judged[name] = score
    return summary_of({one: judged[one] for one in of})


def judged_file(answers: Path) -> Path:
    """Where what the judge said of these answers is kept."""
    return answers.with_suffix(f".judged{answers.suffix}")


def judged_numbers(file: Path) -> dict[str, Any]:
    """Of what a judge has said so far, as `judge` returns them; its failures are in the file, too."""
    return summary_of(_read(file, with_failures=True))


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
    return {"judged": len(given), "not_judged": failed, "diversity": mean, "interval": bootstrap_interval(given)}


def _read(file: Path, with_failures: bool = False) -> dict[str, int | None]:
    """Problems that have a score, the last of each; one that had none is judged again."""
    if not file.exists():
        return {}
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            one = json.loads(line)
            found[one["id"]] = one["score"]
        except (ValueError, KeyError, TypeError):  # the last of a process that was ended
            continue
    return {name: score for name, score in found.items() if with_failures or score is not None}


__all__ = ["judge", "judged_file", "judged_numbers", "prompt_of", "score_of", "summary_of"]
