"""A CodeForces rating from local standings, as CodeElo (Quan et al., 2025) and the FlowRL paper compute it.

In each contest the model takes part as one more contestant. A problem that it solves at its a-th attempt is worth its
points less 50 for each failed attempt before; a problem it does not solve, nothing. Its rank among the humans, by
points, gives a rating: the r at which a contestant of rating r is expected to have that rank,

    rank = 1 + sum over humans i of 1 / (1 + 10^((r - r_i) / 400))

found by bisection. The rating of the model is the mean over contests; its percentile, the share of a list of human
ratings that is below.

A contest's file is JSON:

    {"contest": "1900", "problems": {"A": 500, "B": 1000}, "standings": [{"rating": 1523, "points": 1372.0}, ..]}

where `points` of a problem are its most, and a contestant's rating is that from before the contest. Beside them may be
ratings.json, a list of ratings of all kinds of contestants, for the percentile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_flowrl.config import UserError

PENALTY = 50.0
"""Points that a failed attempt before the right one costs."""

RATINGS = "ratings.json"
_LOWEST, _HIGHEST = -5000.0, 10_000.0


@dataclass(frozen=True)
class Contest:
    """Problems and what they are worth at most; the humans' ratings and points."""

    name: str
    problems: Mapping[str, float]
    ratings: tuple[float, ...]
    points: tuple[float, ...]


def points_of(most: float, attempts: Sequence[bool]) -> float:
    """Of a problem, from its attempts in order: which of them were right. Never below 0."""
    failed = next((place for place, right in enumerate(attempts) if right), None)
    return 0.0 if failed is None else max(most - PENALTY * failed, 0.0)


def rank_of(points: float, standings: Sequence[float]) -> int:
    """1 + how many have more. Equal points share the better rank."""
    return 1 + sum(one > points for one in standings)


def expected_rank(rating: float, ratings: Sequence[float]) -> float:
    """Of a contestant of this rating, by the formula of the module."""
    return 1.0 + math.fsum(1.0 / (1.0 + 10.0 ** ((rating - one) / 400.0)) for one in ratings)


def rating_of(rank: float, ratings: Sequence[float]) -> float:
    """The rating whose expected rank is `rank`, to 0.001. First and last place give the ends of the range searched."""
    low, high = _LOWEST, _HIGHEST
    while high - low > 1e-3:
        middle = (low + high) / 2
        if expected_rank(middle, ratings) > rank:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def contest_rating(contest: Contest, attempts: Mapping[str, Sequence[bool]]) -> float:
    """Of a model, by its attempts at the problems. The range's ends, of a first or last place, are not let through.

    First place counts as half a place behind it (rank 1.5) and last as half a place before: the formula has no finite
    answer to either.
    """
    points = math.fsum(points_of(most, attempts.get(name, ())) for name, most in contest.problems.items())
    rank = float(rank_of(points, contest.points))
    return rating_of(min(max(rank, 1.5), len(contest.ratings) + 0.5), contest.ratings)


def model_rating(ratings: Sequence[float]) -> float:
    """The mean over contests."""
    return fmean(ratings)


def percentile(rating: float, humans: Sequence[float]) -> float:
    """Share of the humans' ratings that is below, in percent."""
    return 100.0 * sum(one < rating for one in humans) / len(humans)


def read_contest(path: Path) -> Contest:
    """A contest's file. Raises UserError, naming what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    try:
        problems = {str(name): _number(most) for name, most in content["problems"].items()}
        rows = [(_number(row["rating"]), _number(row["points"])) for row in content["standings"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: {type(error).__name__}: {error}; a contest has problems (name: points) and standings, a list of "
            "rating and points"
        ) from error
    if not problems or not rows:
        raise UserError(f"{path}: a contest has problems and standings, and one of them is empty")
    ratings, points = zip(*rows, strict=True)
    return Contest(str(content.get("contest", path.stem)), problems, ratings, points)


def read_ratings(folder: str | None) -> list[float]:
    """Of the humans that a rating is compared with; none where there is no ratings.json. Raises UserError."""
    file = Path(folder or "", RATINGS)
    if folder is None or not file.exists():
        return []
    try:
        return [_number(one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no list of ratings: {error}") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


__all__ = [
    "PENALTY",
    "RATINGS",
    "Contest",
    "contest_rating",
    "expected_rank",
    "model_rating",
    "percentile",
    "points_of",
    "rank_of",
    "rating_of",
    "read_contest",
    "read_ratings",
]
