"""FlowRL against its formula, a sequence at a time, for every switch; and what holds whatever the switches say."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_flowrl.objectives.batch import Needs
from megatron_flowrl.objectives.flowrl import FlowRL, residual
from megatron_flowrl.objectives.importance import ImportanceWeight
from tests.objectives.ragged import (
    EQUAL_GROUP,
    LONE_GROUP,
    Expected,
    Ragged,
    assert_as_expected,
    assert_no_cut_matters,
    long_answer,
    make_ragged,
    outcome,
)

NORMALIZATIONS = ("none", "log_probs", "residual")
REWARDS = ("raw", "group_mean", "leave_one_out", "group_norm")
LEVELS, CLIPS = ("sum", "mean", "none"), ("none", "max", "two_sided")
PARTITIONS, REFERENCES = ("mlp", "group", "none"), ("reference", "old", "none")
LIMITS = (math.inf, 1.5)
BETA, EXPONENT, MAXIMUM, LOW, HIGH = 3.0, 0.7, 1.1, 0.2, 0.28


def flowrl(normalization: str, reward: str, level: str, clip: str, log_z: str, reference: str, limit: float) -> FlowRL:
    settings: dict[str, Any] = {
        "length_normalization": normalization,
        "reward": reward,
        "log_z": log_z,
        "reference": reference,
    }
    how: dict[str, Any] = {"level": level, "clip": clip}
    importance = ImportanceWeight(**how, maximum=MAXIMUM, low=LOW, high=HIGH)
    return FlowRL(BETA, length_exponent=EXPONENT, importance=importance, residual_limit=limit, **settings)


def transformed(ragged: Ragged, how: str, index: int) -> float:
    """The reward of an answer among those to its prompt."""
    values = [ragged.rewards[other] for other in ragged.group_of(index)]
    reward, count = ragged.rewards[index], len(values)
    if how == "raw" or count == 1:
        return reward
    if how == "leave_one_out":
        return reward - (math.fsum(values) - reward) / (count - 1)
    mean = math.fsum(values) / count
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return (reward - mean) / (std + 1e-6) if how == "group_norm" else reward - mean


def expected_of(ragged: Ragged, objective: FlowRL) -> Expected:
    """Section 1 and 3 of the design: delta, w and w delta^2 by sequence, gradients by hand; w has none."""
    found, count = Expected.nothing(ragged), len(ragged.lengths)
    policy, old, log_z = ragged.log_probs.tolist(), ragged.old.tolist(), ragged.log_z.tolist()
    base = {"reference": ragged.reference.tolist(), "old": old, "none": [0.0] * len(old)}[objective.reference]
    weights = [1.0] * len(old) if ragged.sampler_weight is None else ragged.sampler_weight.tolist()

    def flow(log_probs: list[float], index: int) -> float:
        total = math.fsum(log_probs[t] - base[t] for t in ragged.tokens_of(index))
        return total / max(1, ragged.lengths[index]) if objective.length_normalization == "log_probs" else total

    for index in range(count):
        tokens, length = ragged.tokens_of(index), max(1, ragged.lengths[index])
        z = {"mlp": log_z[index], "none": 0.0}.get(objective.log_z)
        if z is None:
            group = ragged.group_of(index)
            z = math.fsum(BETA * transformed(ragged, objective.reward, i) - flow(old, i) for i in group) / len(group)
        scale = length**-EXPONENT if objective.length_normalization == "residual" else 1.0
        delta = scale * (z + flow(policy, index) - BETA * transformed(ragged, objective.reward, index))
        log_w = math.fsum(policy[t] - old[t] for t in tokens)
        w = math.exp({"sum": log_w, "mean": log_w / length, "none": 0.0}[objective.importance.level])
        w = {"none": w, "max": min(w, MAXIMUM), "two_sided": min(1 + HIGH, max(1 - LOW, w))}[objective.importance.clip]
        w *= math.fsum(weights[t] for t in tokens) / length if tokens else 1.0
        limit = objective.residual_limit
        found.loss += w / count * (delta**2 if abs(delta) <= limit else limit * (2 * abs(delta) - limit))
        slope = w / count * 2 * min(limit, max(-limit, delta)) * scale
        found.by_log_z[index] = slope if objective.log_z == "mlp" else 0.0
        for t in tokens:
            found.by_log_probs[t] = slope / length if objective.length_normalization == "log_probs" else slope
    return found


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("log_z", PARTITIONS)
@pytest.mark.parametrize("reference", REFERENCES)
def test_loss_and_gradients_are_the_formulas(normalization: str, reward: str, log_z: str, reference: str) -> None:
    for number, (level, clip, limit, weighted) in enumerate(itertools.product(LEVELS, CLIPS, LIMITS, (False, True))):
        ragged = make_ragged(number, sampler_weight=weighted)
        objective = flowrl(normalization, reward, level, clip, log_z, reference, limit)
        assert_as_expected(outcome(objective, ragged), expected_of(ragged, objective), (objective, number))


def test_every_switch_does_something() -> None:
    """Else the comparison above would not notice one that is ignored on both sides."""
    first = ("none", "raw", "sum", "none", "mlp", "reference", math.inf)
    choices = (NORMALIZATIONS, REWARDS, LEVELS, CLIPS, PARTITIONS, REFERENCES, LIMITS)
    ragged = make_ragged()
    losses = {float(outcome(flowrl(*first), ragged).loss)}
    changed = [(*first[:place], value, *first[place + 1 :]) for place, c in enumerate(choices) for value in c]
    changed = [settings for settings in changed if settings != first]
    losses |= {float(outcome(flowrl(*settings), ragged).loss) for settings in changed}  # type: ignore[arg-type]
    assert len(losses) == 1 + len(changed)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("log_z", PARTITIONS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(3))
def test_no_cut_into_micro_batches_changes_anything(normalization: str, log_z: str, clip: str, seed: int) -> None:
    """The released code weighs each micro-batch by 9 over a number of its own."""
    objective = flowrl(normalization, "group_norm", "sum", clip, log_z, "reference", math.inf)
    assert_no_cut_matters(objective, make_ragged(seed, sampler_weight=True), seed)


def test_the_mean_is_over_sequences_and_not_over_tokens() -> None:
    """In a mini-batch of twice the answers each counts half, however many tokens there are."""
    ragged = make_ragged()
    objective = flowrl("none", "raw", "sum", "max", "mlp", "reference", math.inf)
    batch = ragged.batch(objective.prepare(ragged.rollout), range(len(ragged.lengths)))
    once, _ = objective(batch)
    halved, _ = objective(replace(batch, num_sequences=2 * batch.num_sequences, num_tokens=7 * batch.num_tokens))
    assert torch.equal(halved, once / 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_weights_are_one_and_equal_policies_cancel(level: str, clip: str, dtype: torch.dtype) -> None:
    ragged = long_answer(torch.ones(1000), dtype=dtype)
    with torch.no_grad():
        ragged.log_probs -= torch.rand(1001, generator=torch.Generator().manual_seed(0), dtype=dtype)
        ragged.log_z += 0.3
    ragged.old = ragged.reference = ragged.log_probs.detach().clone()
    statistics = outcome(flowrl("none", "raw", level, clip, "mlp", "reference", math.inf), ragged).statistics
    assert torch.equal(statistics["weight"], torch.ones(2, dtype=dtype))
    assert not statistics["weight_clipped"].any() and not statistics["log_ratio_clamped"].any()
    assert torch.equal(statistics["residual"], ragged.log_z.detach() - BETA * torch.tensor([1.0, 0.0], dtype=dtype))
    assert not statistics["kl_old"].any() and not statistics["kl_reference"].any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("ratio", [1.1, 0.9])
def test_long_answers_stay_finite(normalization: str, level: str, clip: str, ratio: float) -> None:
    """8,192 tokens at 1.1 are exp(781), which neither fp32 nor fp64 holds."""
    ragged = long_answer(torch.full((8192,), ratio))
    found = outcome(flowrl(normalization, "raw", level, clip, "mlp", "reference", math.inf), ragged)
    assert found.loss.isfinite() and found.by_log_probs.isfinite().all() and found.by_log_z.isfinite().all()
    assert found.by_log_probs.any() and found.by_log_z.any()
    assert found.statistics["log_ratio_clamped"].tolist() == [float(level == "sum"), 0.0]
    assert all(values[0].isfinite() for name, values in found.statistics.items())
    base = 8192 * math.log(ratio)
    tokens = {"none": 1.0, "log_probs": 1.0, "residual": 8192**EXPONENT}[normalization]
    wanted = (base / 8192 if normalization == "log_probs" else base) - BETA
    assert float(found.statistics["residual"][0]) == pytest.approx(wanted / tokens, rel=1e-4)


def test_equal_rewards_pull_to_the_reference_and_log_z_to_zero() -> None:
    """Where the policy is the reference and log Z is 0, nothing is left to pull; elsewhere there is."""
    objective = flowrl("log_probs", "group_norm", "none", "none", "mlp", "reference", math.inf)
    ragged = make_ragged()
    equal = [index for index, group in enumerate(ragged.groups) if group == EQUAL_GROUP]
    assert len(equal) == 4 and not objective.prepare(ragged.rollout).sequences["scaled_reward"][equal].any()
    apart = outcome(objective, ragged)
    assert apart.by_log_z[equal].all()
    assert all((apart.by_log_z[i] * apart.statistics["residual"][i]) > 0 for i in equal)
    with torch.no_grad():
        ragged.log_z.zero_()
        ragged.log_probs.copy_(ragged.reference)
    together = outcome(objective, ragged)
    assert not together.statistics["residual"][equal].any() and not together.by_log_z[equal].any()
    assert not together.by_log_probs[[t for i in equal for t in ragged.tokens_of(i)]].any()


def test_the_groups_log_z_is_of_all_its_answers_and_of_a_lone_one_its_own() -> None:
    ragged = make_ragged()
    ragged.old = ragged.log_probs.detach().clone()  # on-policy: the residuals of each group then have the mean 0
    for normalization in NORMALIZATIONS[:2]:
        objective = flowrl(normalization, "raw", "sum", "max", "group", "reference", math.inf)
        residuals = outcome(objective, ragged).statistics["residual"]
        for group in set(ragged.groups):
            members = [index for index, number in enumerate(ragged.groups) if number == group]
            assert float(residuals[members].mean()) == pytest.approx(0.0, abs=1e-12)
            assert (group == LONE_GROUP) == (len(members) == 1)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_empty_answer_teaches_log_z_alone(normalization: str) -> None:
    ragged = make_ragged()
    empty = ragged.lengths.index(0)
    objective = flowrl(normalization, "raw", "sum", "two_sided", "mlp", "reference", math.inf)
    found = outcome(objective, ragged)
    delta = ragged.log_z.detach()[empty] - BETA * ragged.rewards[empty]
    assert found.statistics["residual"][empty] == delta and found.statistics["weight"][empty] == 1.0
    assert float(found.by_log_z[empty]) == pytest.approx(float(2 * delta) / len(ragged.lengths), rel=1e-14)


def test_an_answer_of_one_token_has_one_residual_under_every_normalization() -> None:
    ragged = make_ragged()
    one = ragged.lengths.index(1)
    objectives = [flowrl(how, "raw", "sum", "max", "mlp", "reference", math.inf) for how in NORMALIZATIONS]
    found = [float(outcome(objective, ragged).statistics["residual"][one]) for objective in objectives]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("log_z", PARTITIONS)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_micro_batch_without_sequences_has_a_loss_of_zero(log_z: str, limit: float) -> None:
    ragged = make_ragged(sampler_weight=True)
    found = outcome(flowrl("residual", "group_norm", "sum", "max", log_z, "reference", limit), ragged, [[]])
    assert found.loss == 0.0 and not found.by_log_probs.any() and not found.by_log_z.any()


def test_a_rollout_without_answers_is_prepared() -> None:
    ragged = make_ragged()
    empty = replace(
        ragged, lengths=[], rewards=[], groups=[], old=torch.zeros(0), reference=torch.zeros(0)
    ).rollout  # fmt: skip
    for reward, log_z in itertools.product(REWARDS, PARTITIONS):
        objective = flowrl("none", reward, "sum", "max", log_z, "reference", math.inf)
        assert all(values.shape == (0,) for values in objective.prepare(empty).sequences.values())


def test_a_residual_pulls_no_harder_than_at_the_limit() -> None:
    delta = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.9, 2.0, 100.0], dtype=torch.float64)
    ragged = long_answer(torch.ones(1), dtype=torch.float64)
    ragged = replace(ragged, lengths=[0] * 7, rewards=[0.0] * 7, groups=[0] * 7, log_z=delta.requires_grad_())
    found = outcome(flowrl("none", "raw", "sum", "max", "mlp", "reference", 2.0), ragged)
    assert (7 * found.by_log_z).tolist() == pytest.approx([-4.0, -4.0, -2.0, 0.0, 3.8, 4.0, 4.0], rel=1e-14)
    assert float(7 * found.loss) == pytest.approx(32.0 + 4.0 + 1.0 + 0.0 + 3.61 + 4.0 + 396.0, rel=1e-14)


def test_the_residual_by_hand() -> None:
    """log Z 1, log ratio -4 over 4 tokens, beta r 2."""
    found = {
        how: residual(1.0, torch.tensor([-4.0]), torch.tensor([2.0]), torch.tensor([4.0]), how, 0.5).item()
        for how in ("none", "log_probs", "residual")
    }
    assert found == {"none": -5.0, "log_probs": -2.0, "residual": -2.5}


def test_what_is_needed() -> None:
    assert FlowRL(1.0).needs == Needs(reference=True, log_z=True)
    assert FlowRL(1.0, log_z="group").needs == Needs(old=True, reference=True)
    assert FlowRL(1.0, log_z="none", reference="none").needs == FlowRL(1.0, log_z="none", reference="old").needs
    assert FlowRL(1.0, log_z="none", reference="old").needs == Needs()


def test_missing_inputs_are_named() -> None:
    rollout, objective = make_ragged().rollout, FlowRL(1.0, log_z="group")
    with pytest.raises(ValueError, match="needs reference log-probs"):
        objective.prepare(replace(rollout, reference_log_probs=None))
    with pytest.raises(ValueError, match="needs old log-probs"):
        objective.prepare(replace(rollout, old_log_probs=None))
    batch = make_ragged().batch(FlowRL(1.0).prepare(rollout), [0, 1])
    with pytest.raises(ValueError, match="log Z"):
        FlowRL(1.0)(replace(batch, log_z=None))
    with pytest.raises(ValueError, match="needs reference log-probs"):
        FlowRL(1.0)(replace(batch, reference_log_probs=None))
