"""Numbers of graded answers: how good they are, how different, how long."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev


@dataclass(frozen=True)
class GradedAnswer:
    """What is counted of an answer. `key`: its canonical form, where the grader knows one."""

    prompt: int
    reward: float
    tokens: int
    truncated: bool
    key: str | None = None
    failed: bool = False
    num_solutions: int | None = None  # of its prompt, where the data says so


def summarize_answers(answers: Sequence[GradedAnswer], correct_from: float) -> dict[str, float]:
    """Means over answers; and over prompts of what is counted of each.

    reward_mean, reward_std; accuracy: share of answers whose reward is at least `correct_from`; solved: share of
    prompts with such an answer; distinct_correct: different keys among a prompt's correct answers; coverage: the same
    as a share of all that the prompt has; mixed_groups: share of prompts whose rewards differ; length and
    truncated_share: in tokens, and cut off by the limit; ungraded_share.
    """
    if not answers:
        return {}
    of_prompt: dict[int, list[GradedAnswer]] = defaultdict(list)
    for answer in answers:
        of_prompt[answer.prompt].append(answer)
    right = [answer.reward >= correct_from for answer in answers]
    rewards = [answer.reward for answer in answers]
    found = {
        "reward_mean": fmean(rewards),
        "reward_std": pstdev(rewards),
        "accuracy": fmean(right),
        "solved": fmean(any(a.reward >= correct_from for a in group) for group in of_prompt.values()),
        "mixed_groups": fmean(len({a.reward for a in group}) > 1 for group in of_prompt.values()),
        "length_mean": fmean(answer.tokens for answer in answers),
        "length_max": float(max(answer.tokens for answer in answers)),
        "truncated_share": fmean(answer.truncated for answer in answers),
        "ungraded_share": fmean(answer.failed for answer in answers),
    }
    keys = [{a.key for a in group if a.key is not None and a.reward >= correct_from} for group in of_prompt.values()]
    if any(answer.key is not None for answer in answers):
        found["distinct_correct"] = fmean(map(len, keys))
    counts = [group[0].num_solutions for group in of_prompt.values()]
    shares = [len(some) / count for some, count in zip(keys, counts, strict=True) if count]
    if shares:
        found["coverage"] = fmean(shares)
    return found


__all__ = ["GradedAnswer", "summarize_answers"]
