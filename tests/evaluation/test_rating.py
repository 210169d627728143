"""A CodeForces rating, against contests worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_flowrl.config import UserError
from megatron_flowrl.evaluation.rating import (
    Contest,
    contest_rating,
    expected_rank,
    model_rating,
    percentile,
    points_of,
    rank_of,
    rating_of,
    read_contest,
)


def test_points() -> None:
    assert points_of(500, [True]) == 500 and points_of(500, [False, False, True, False]) == 400
    assert points_of(500, [False] * 9) == points_of(500, []) == 0
    assert points_of(100, [False, False, False, True]) == 0  # 100 - 150 is not paid for


def test_rank() -> None:
    assert rank_of(10, [30, 20, 10, 10, 5]) == 3 and rank_of(31, [30]) == 1 and rank_of(0, [3, 2, 1]) == 4


def test_expected_rank_by_hand() -> None:
    # Against one's equal: half. Against one 400 points above: 10 / 11; against one 400 below: 1 / 11.
    assert expected_rank(1500, [1500]) == 1.5
    assert expected_rank(1500, [1900]) == pytest.approx(1 + 10 / 11)
    assert expected_rank(1500, [1100, 1900]) == pytest.approx(2.0)


def test_rating_is_where_the_rank_is_expected() -> None:
    assert rating_of(1.5, [1500]) == pytest.approx(1500, abs=0.01)
    assert rating_of(2.0, [1100, 1900]) == pytest.approx(1500, abs=0.01)
    assert rating_of(1 + 2 / 11, [1500, 1500]) == pytest.approx(1900, abs=0.01)  # 400 above both: 1/11 each
    humans = [800 + 13 * i for i in range(100)]
    ratings = [rating_of(rank, humans) for rank in range(2, 100)]
    assert ratings == sorted(ratings, reverse=True)


def test_a_contest_by_hand() -> None:
    contest = Contest("c", {"A": 500, "B": 1000}, (1100, 1900), (450, 1500))
    # A at the second attempt: 450, as many as the first human; the second has more: rank 2, whose rating is 1500.
    assert contest_rating(contest, {"A": [False, True], "B": [False] * 8}) == pytest.approx(1500, abs=0.01)
    best, worst = (contest_rating(contest, {"A": [right], "B": [right]}) for right in (True, False))
    assert expected_rank(best, contest.ratings) == pytest.approx(1.5, abs=1e-3)  # first, half a place down
    assert expected_rank(worst, contest.ratings) == pytest.approx(2.5, abs=1e-3)  # last, half a place up
    assert model_rating([1400.0, 1600.0]) == 1500.0
    assert percentile(1500, [1000, 1499, 1500, 2000]) == 50.0


def test_a_contests_file(tmp_path: Path) -> None:
    file = tmp_path / "1900.json"
    file.write_text(json.dumps({"problems": {"A": 500}, "standings": [{"rating": 1500, "points": 400.5}]}))
    assert read_contest(file) == Contest("1900", {"A": 500.0}, (1500.0,), (400.5,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "a contest has problems"),
        ('{"problems": {"A": 500}}', "KeyError: 'standings'"),
        ('{"problems": {"A": "x"}, "standings": []}', "'x' is no number"),
        ('{"problems": {"A": 1}, "standings": []}', "one of them is empty"),
        ('{"problems": {"A": 1}, "standings": [{"rating": null, "points": 1}]}', "None is no number"),
    ],
)
def test_a_file_that_is_no_contest(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_contest(tmp_path / "c.json")
    with pytest.raises(UserError, match=r"gone\.json cannot be read"):
        read_contest(tmp_path / "gone.json")
