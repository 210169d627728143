"""What is made of rewards, against loops over the answers to each prompt; equal rewards are exactly zero."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import group_sums
from megatron_flowrl.objectives.rewards import informative, overlong_penalty, transform_rewards
from tests.objectives.ragged import EQUAL_GROUP, LONE_GROUP, make_ragged

TRANSFORMS = ("raw", "group_mean", "leave_one_out", "group_norm")
RELATIVE = TRANSFORMS[1:]


def transform(rewards: list[float] | Tensor, groups: list[int], how: Any) -> list[float]:
    given = rewards if isinstance(rewards, Tensor) else torch.tensor(rewards, dtype=torch.float64)
    found = transform_rewards(given, torch.tensor(groups, dtype=torch.int64), how)
    assert found.dtype == torch.float64 and found.shape == given.shape
    return found.tolist()


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("seed", range(5))
def test_rewards_are_the_formulas(how: str, seed: int) -> None:
    """In exact fractions; the groups' numbers have gaps and their answers are mixed."""
    ragged = make_ragged(seed)
    wanted = []
    for index, reward in enumerate(ragged.rewards):
        values = [Fraction(ragged.rewards[other]) for other in ragged.group_of(index)]
        count, mean = len(values), sum(values) / len(values)
        if how == "raw" or count == 1:
            wanted.append(reward)
        elif how == "leave_one_out":
            wanted.append(float(Fraction(reward) - (sum(values) - Fraction(reward)) / (count - 1)))
        else:
            variance = sum((value - mean) ** 2 for value in values) / (count - 1)
            divisor = math.sqrt(variance) + 1e-6 if how == "group_norm" else 1.0
            wanted.append(float(Fraction(reward) - mean) / divisor)
    assert transform(ragged.rewards, ragged.groups, how) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_by_hand() -> None:
    """One right answer of four: mean 1/4, unbiased variance 1/4; beside it one alone, in the middle."""
    rewards, groups = [0.0, 1.0, 5.0, 0.0, 0.0], [8, 8, 2, 8, 8]
    assert transform(rewards, groups, "group_mean") == [-0.25, 0.75, 5.0, -0.25, -0.25]
    assert transform(rewards, groups, "leave_one_out") == pytest.approx([-1 / 3, 1.0, 5.0, -1 / 3, -1 / 3], rel=1e-15)
    normed = [-0.25 / 0.500001, 0.75 / 0.500001, 5.0, -0.25 / 0.500001, -0.25 / 0.500001]
    assert transform(rewards, groups, "group_norm") == pytest.approx(normed, rel=1e-14)


@pytest.mark.parametrize("how", RELATIVE)
@pytest.mark.parametrize("count", [2, 3, 7, 64])
@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, -1e9, 1e-300])
def test_equal_rewards_are_exactly_zero(how: str, count: int, value: float) -> None:
    """Seven of 0.7 are the case in which a rounded mean shows."""
    rewards = [value] * count + [1.0, 0.0]
    assert transform(rewards, [4] * count + [1, 1], how)[:count] == [0.0] * count


@pytest.mark.parametrize("how", RELATIVE)
def test_equal_rewards_of_fp32_are_exactly_zero(how: str) -> None:
    assert transform(torch.full((7,), 0.7), [0] * 7, how) == [0.0] * 7


@pytest.mark.parametrize("how", RELATIVE)
def test_rewards_that_differ_by_a_rounding_stay_small(how: str) -> None:
    """0.1 + 0.2 beside 0.3: nothing there to learn from."""
    assert all(abs(value) < 1e-9 for value in transform([0.1 + 0.2, 0.3, 0.3, 0.3], [0] * 4, how))


@pytest.mark.parametrize("how", TRANSFORMS)
def test_an_answer_that_is_alone_keeps_its_reward(how: str) -> None:
    ragged = make_ragged()
    index = ragged.groups.index(LONE_GROUP)
    assert transform(ragged.rewards, ragged.groups, how)[index] == ragged.rewards[index]
    assert transform([0.3, -2.0], [5, 1], how) == [0.3, -2.0]


@pytest.mark.parametrize("how", RELATIVE)
def test_a_constant_of_a_prompt_does_not_matter(how: str) -> None:
    """Even one much larger than the differences, which a naive variance loses."""
    rewards = [0.0, 1.0, 0.0, 0.5]
    shifted = transform([value + 2.0**30 for value in rewards], [0] * 4, how)
    assert shifted == pytest.approx(transform(rewards, [0] * 4, how), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("how", TRANSFORMS)
def test_no_answers_have_no_rewards(how: str) -> None:
    assert transform([], [], how) == []


@pytest.mark.parametrize("how", TRANSFORMS)
def test_the_order_of_answers_does_not_matter(how: str) -> None:
    ragged = make_ragged(1)
    found = transform(ragged.rewards, ragged.groups, how)
    back = transform(ragged.rewards[::-1], ragged.groups[::-1], how)[::-1]
    assert back == pytest.approx(found, rel=1e-13, abs=1e-15)


def test_groups_that_differ_are_informative() -> None:
    rewards = torch.tensor([1.0, 0.7, 0.0, 0.7, 0.3, 0.7, 1.0], dtype=torch.float64)
    groups = torch.tensor([9, 4, 9, 4, 1, 4, 9])
    assert informative(rewards, groups).tolist() == [True, False, True, False, False, False, True]
    ragged = make_ragged()
    kept = informative(ragged.rollout.rewards, ragged.rollout.groups).tolist()
    assert kept == [group not in (EQUAL_GROUP, LONE_GROUP) for group in ragged.groups]


@pytest.mark.parametrize("different", range(4))
def test_one_answer_makes_its_group_informative_wherever_it_is(different: int) -> None:
    rewards = torch.zeros(4)
    rewards[different] = 1e-30
    assert informative(rewards, torch.zeros(4, dtype=torch.int64)).all()


def test_nothing_is_informative_of_nothing() -> None:
    assert informative(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_the_overlong_penalty_at_its_edges() -> None:
    lengths = torch.tensor([0, 1, 79, 80, 81, 90, 99, 100, 101, 10_000])
    found = overlong_penalty(lengths, max_tokens=100, buffer=20)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0, 0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1], rel=1e-14, abs=0.0)
    assert overlong_penalty(torch.tensor([0, 50, 100]), 100, 100).tolist() == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_an_overlong_buffer_that_does_not_fit_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match=rf"buffer of {buffer} tokens .* max_tokens = 100"):
        overlong_penalty(torch.tensor([1]), 100, buffer)


def test_sums_of_groups() -> None:
    sums, sizes = group_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([5, -1, 5, 0]))
    assert sums.tolist() == [5.0, 2.0, 5.0, 8.0] and sizes.tolist() == [2.0, 1.0, 2.0, 1.0]
    assert sums.dtype == sizes.dtype == torch.float64
