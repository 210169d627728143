"""Importance weights of whole answers, and the weights for what the sampler computes otherwise, against plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import Prepared
from megatron_flowrl.objectives.importance import ImportanceWeight, sampler_weights
from tests.objectives.ragged import long_answer, make_ragged

LEVELS, CLIPS = ("sum", "mean", "none"), ("none", "max", "two_sided")
NONE = Prepared()


def importance(level: str, clip: str, **bounds: float) -> ImportanceWeight:
    settings: dict[str, Any] = {"level": level, "clip": clip, **bounds}
    return ImportanceWeight(**settings)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_the_formula(level: str, clip: str, seed: int) -> None:
    ragged = make_ragged(seed)
    batch = ragged.batch(NONE, range(len(ragged.lengths)))
    found, statistics = importance(level, clip, maximum=1.1, low=0.1, high=0.15)(batch)
    wanted, clipped = [], []
    difference = (ragged.log_probs.detach() - ragged.old).tolist()
    for index, length in enumerate(ragged.lengths):
        total = math.fsum(difference[t] for t in ragged.tokens_of(index))
        ratio = math.exp({"sum": total, "mean": total / max(1, length), "none": 0.0}[level])
        wanted.append({"none": ratio, "max": min(1.1, ratio), "two_sided": min(1.15, max(0.9, ratio))}[clip])
        clipped.append(float(wanted[-1] != ratio))
    torch.testing.assert_close(found, double(wanted), rtol=1e-12, atol=0.0)
    assert torch.equal(statistics["weight"], found) and statistics["weight_clipped"].tolist() == clipped
    assert any(clipped) == (clip != "none" and level != "none")
    assert not statistics["log_ratio_clamped"].any()


def test_weights_are_constants() -> None:
    ragged = make_ragged()
    for level, clip in itertools.product(LEVELS, CLIPS):
        found, statistics = importance(level, clip)(ragged.batch(NONE, [0, 1, 2]))
        assert not found.requires_grad and not any(values.requires_grad for values in statistics.values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", CLIPS)
def test_a_policy_has_the_weight_1_against_itself(level: str, clip: str) -> None:
    """To the bit, however many tokens: what the first mini-batch of a step has."""
    ragged = make_ragged()
    ragged.old = ragged.log_probs.detach()
    found, statistics = importance(level, clip)(ragged.batch(NONE, range(len(ragged.lengths))))
    assert found.tolist() == [1.0] * len(ragged.lengths) and not statistics["weight_clipped"].any()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("ratio", "at_sum"), [(1.1, math.exp(20)), (0.9, math.exp(-20))])
def test_the_logarithm_is_kept_within_20_under_every_clip(clip: str, ratio: float, at_sum: float) -> None:
    """8,192 tokens of ratio 1.1 are exp(781), of ratio 0.9 exp(-863)."""
    batch = long_answer(torch.full((8192,), ratio)).batch(NONE, [0, 1])
    for level, held in {"sum": at_sum, "mean": ratio, "none": 1.0}.items():
        weight, statistics = importance(level, clip)(batch)
        bounded = {"none": held, "max": min(10.0, held), "two_sided": min(1.28, max(0.8, held))}[clip]
        assert weight.tolist() == pytest.approx([bounded, 1.0], rel=2e-5) and weight.dtype == torch.float32
        assert statistics["log_ratio_clamped"].tolist() == [float(level == "sum"), 0.0]
        assert statistics["weight_clipped"].tolist() == [float(bounded != held), 0.0]


@pytest.mark.parametrize(("log_ratio", "clamped"), [(20.0, 0.0), (20.25, 1.0), (-20.0, 0.0), (-20.25, 1.0)])
def test_what_is_clamped_is_counted(log_ratio: float, clamped: float) -> None:
    ragged = long_answer(torch.ones(3), dtype=torch.float64)
    ragged.old = ragged.log_probs.detach() - double([log_ratio, 0.0, 0.0, 0.0])
    weight, statistics = importance("sum", "none")(ragged.batch(NONE, [0, 1]))
    assert statistics["log_ratio_clamped"].tolist() == [clamped, 0.0]
    assert float(weight[0]) == pytest.approx(math.exp(math.copysign(20.0, log_ratio)), rel=1e-14)


def test_no_sequences_have_no_weights() -> None:
    for level, clip in itertools.product(LEVELS, CLIPS):
        weight, statistics = importance(level, clip)(make_ragged().batch(NONE, []))
        assert weight.shape == (0,) and all(values.shape == (0,) for values in statistics.values())


def weights(old: list[float], sampler: list[float], lengths: list[int], **settings: Any) -> list[float]:
    found = sampler_weights(double(old), double(sampler), torch.tensor([0, *lengths]).cumsum(0), **settings)
    assert found.dtype == torch.float64
    return found.tolist()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize(("minimum", "maximum"), [(0.0, 1.2), (0.9, 1.1)])
@pytest.mark.parametrize("seed", range(3))
def test_sampler_weights_are_the_formula(level: str, mode: str, minimum: float, maximum: float, seed: int) -> None:
    ragged = make_ragged(seed)
    old, sampler = ragged.old.tolist(), ragged.reference.tolist()
    wanted = []
    for index in range(len(ragged.lengths)):
        tokens = ragged.tokens_of(index)
        total = math.fsum(old[t] - sampler[t] for t in tokens)
        for t in tokens:
            rho = math.exp(old[t] - sampler[t] if level == "token" else total)
            wanted.append(min(rho, maximum) if mode == "truncate" else rho * (minimum <= rho <= maximum))
    found = weights(old, sampler, ragged.lengths, level=level, mode=mode, maximum=maximum, minimum=minimum)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert max(wanted) <= maximum and (0.0 in wanted) == (mode == "mask")


def test_equal_programs_have_the_sampler_weight_1() -> None:
    log_probs = [-0.1, -7.0, -30.0]
    for level, mode in itertools.product(("token", "sequence"), ("truncate", "mask")):
        assert weights(log_probs, log_probs, [1, 0, 2], level=level, mode=mode, maximum=2.0) == [1.0] * 3


def test_sampler_weights_at_the_edges_count() -> None:
    """Ratios of 1/2, 1, 2 and a little more: the limits themselves are within."""
    old, sampler = [0.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, -math.log(2), -math.log(2.1)]
    masked = weights(old, sampler, [4], level="token", mode="mask", minimum=0.5, maximum=2.0)
    assert masked == pytest.approx([0.5, 1.0, 2.0, 0.0], rel=1e-15)
    cut = weights(old, sampler, [4], level="token", mode="truncate", maximum=2.0)
    assert cut == pytest.approx([0.5, 1.0, 2.0, 2.0], rel=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["old", "sampler", "both"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_what_is_not_finite_gets_no_weight(value: float, where: str, mode: str) -> None:
    """The token by itself, or its answer; the other answer keeps its own."""
    old, sampler = [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]
    if where != "sampler":
        old[1] = value
    if where != "old":
        sampler[1] = value
    settings: dict[str, Any] = {"mode": mode, "maximum": 2.0}
    assert weights(old, sampler, [2, 1], level="token", **settings) == [1.0, 0.0, 1.0]
    assert weights(old, sampler, [2, 1], level="sequence", **settings) == [0.0, 0.0, 1.0]


def test_opposite_infinities_do_not_make_an_answer_usable() -> None:
    found = weights([math.inf, -math.inf, 0.0], [0.0] * 3, [2, 1], level="sequence", mode="truncate", maximum=2.0)
    assert found == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_long_answers_have_finite_sampler_weights(mode: str) -> None:
    for ratio, truncated in ((1.1, 2.0), (0.9, math.exp(-20))):
        settings: dict[str, Any] = {"level": "sequence", "mode": mode, "maximum": 2.0, "minimum": 0.5}
        found = weights([math.log(ratio)] * 8192, [0.0] * 8192, [8192], **settings)
        assert found == pytest.approx([truncated if mode == "truncate" else 0.0] * 8192, rel=1e-12)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens_have_no_sampler_weights(lengths: list[int]) -> None:
    for level, mode in itertools.product(("token", "sequence"), ("truncate", "mask")):
        assert weights([], [], lengths, level=level, mode=mode, maximum=2.0) == []


def test_an_answers_sampler_weight_is_the_mean_of_its_tokens() -> None:
    """An empty one has 1, and so has any where there are no weights."""
    ragged = make_ragged(sampler_weight=True)
    members = range(len(ragged.lengths))
    found = ragged.batch(NONE, members).sequence_sampler_weight
    assert ragged.sampler_weight is not None and isinstance(found, Tensor)
    given = ragged.sampler_weight.tolist()
    wanted = [math.fsum(given[t] for t in ragged.tokens_of(i)) / (ragged.lengths[i] or 1) for i in members]
    assert found.tolist() == pytest.approx([w if ragged.lengths[i] else 1.0 for i, w in enumerate(wanted)], rel=1e-13)
    assert make_ragged().batch(NONE, members).sequence_sampler_weight == 1.0
