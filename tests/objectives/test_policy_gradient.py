"""The reward-maximising methods against their formulas, a token at a time, for every switch; and the joint loss."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_flowrl.objectives.batch import Needs
from megatron_flowrl.objectives.flowrl import FlowRL
from megatron_flowrl.objectives.gflownet_ppo import GFlowNetPPO
from megatron_flowrl.objectives.importance import ImportanceWeight
from megatron_flowrl.objectives.policy_gradient import PolicyGradient, value_loss
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
from tests.objectives.test_flowrl import NORMALIZATIONS, PARTITIONS, flowrl, transformed
from tests.objectives.test_flowrl import expected_of as expected_of_balance

ADVANTAGES = ("group_norm", "group_mean", "leave_one_out", "reinforce_plus_plus", "gae")
RATIOS, AGGREGATIONS = ("token", "sequence"), ("token_mean", "sequence_mean")
SWITCHES: dict[str, tuple[Any, ...]] = {
    "clip_low": (0.2, 0.1),
    "clip_high": (0.2, 0.28),
    "clip_dual": (math.inf, 1.3),
    "kl_coef": (0.0, 0.05),
    "kl_in_reward": (0.0, 0.1),
    "entropy_coef": (0.0, 0.02),
    "entropy_top_share": (1.0, 0.2),
}
ALL_ON: dict[str, Any] = {name: values[1] for name, values in SWITCHES.items()}


def policy_gradient(**settings: Any) -> PolicyGradient:
    return PolicyGradient(**settings)


def standardized(values: list[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / (std + 1e-8) for value in values]


def token_advantages(ragged: Ragged, objective: PolicyGradient) -> list[float]:
    """A of every token: its answer's, or from the rewards and values after it; standardised over all tokens."""
    old, reference, value = ragged.old.tolist(), ragged.reference.tolist(), ragged.values.tolist()
    found = [0.0] * len(old)
    for index in range(len(ragged.lengths)):
        tokens = ragged.tokens_of(index)
        if objective.advantage not in ("reinforce_plus_plus", "gae"):
            for t in tokens:
                found[t] = transformed(ragged, objective.advantage, index)
            continue
        critic = objective.advantage == "gae"
        after, following = 0.0, 0.0
        for t in reversed(tokens):
            reward = ragged.rewards[index] if t == tokens.stop - 1 else 0.0
            reward -= objective.kl_in_reward * (old[t] - reference[t])
            if critic:
                reward += objective.discount * following - value[t]
            after = found[t] = reward + objective.discount * (objective.gae_lambda if critic else 1.0) * after
            following = value[t]
    return standardized(found) if objective.advantage in ("reinforce_plus_plus", "gae") else found


def expected_of(ragged: Ragged, objective: PolicyGradient) -> Expected:
    """The loss of each token and its derivatives, by hand; a sequence's ratio counts as each of its tokens'."""
    found, advantages = Expected.nothing(ragged), token_advantages(ragged, objective)
    policy, old, reference = ragged.log_probs.tolist(), ragged.old.tolist(), ragged.reference.tolist()
    entropy, old_entropy = ragged.entropy.tolist(), ragged.old_entropy.tolist()
    weights = [1.0] * len(old) if ragged.sampler_weight is None else ragged.sampler_weight.tolist()
    chosen = sorted(old_entropy, reverse=True)[: round(objective.entropy_top_share * len(old))]
    for index, length in enumerate(ragged.lengths):
        tokens = ragged.tokens_of(index)
        for t in tokens:
            whole = math.fsum(policy[k] - old[k] for k in tokens) / length
            ratio = math.exp(policy[t] - old[t] if objective.ratio == "token" else whole)
            advantage = advantages[t] if old_entropy[t] in chosen else 0.0
            gain, held = ratio * advantage, min(1 + objective.clip_high, max(1 - objective.clip_low, ratio)) * advantage
            gain, slope = (gain, gain) if gain <= held else (held, 0.0)
            if advantage < 0 and gain < objective.clip_dual * advantage:
                gain, slope = objective.clip_dual * advantage, 0.0
            d = reference[t] - policy[t]
            loss = -weights[t] * gain + objective.kl_coef * (math.exp(d) - 1 - d) - objective.entropy_coef * entropy[t]
            share = len(old) if objective.aggregation == "token_mean" else length * len(ragged.lengths)
            found.loss += loss / share
            found.by_log_probs[t] = (-weights[t] * slope + objective.kl_coef * (1 - math.exp(d))) / share
            found.by_entropy[t] = -objective.entropy_coef / share
    return found


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_and_gradients_are_the_formulas(advantage: str, ratio: str, aggregation: str) -> None:
    for number, values in enumerate(itertools.product(*SWITCHES.values(), (False, True))):
        settings = dict(zip(SWITCHES, values, strict=False))
        objective = policy_gradient(advantage=advantage, ratio=ratio, aggregation=aggregation, **settings)
        ragged = make_ragged(number, sampler_weight=values[-1])
        assert_as_expected(outcome(objective, ragged), expected_of(ragged, objective), (objective, number))


@pytest.mark.parametrize("advantage", ["reinforce_plus_plus", "gae"])
@pytest.mark.parametrize(("discount", "gae_lambda"), [(0.95, 1.0), (1.0, 0.9), (0.9, 0.5)])
def test_discounts_are_the_formulas(advantage: str, discount: float, gae_lambda: float) -> None:
    for seed, penalty in itertools.product(range(3), (0.0, 0.1)):
        objective = policy_gradient(
            advantage=advantage, discount=discount, gae_lambda=gae_lambda, kl_in_reward=penalty
        )  # fmt: skip
        ragged = make_ragged(seed)
        assert_as_expected(outcome(objective, ragged), expected_of(ragged, objective), objective)


def test_every_switch_does_something() -> None:
    """Else the comparison above would not notice one that is ignored on both sides."""
    first = {"advantage": "gae", "ratio": "token", "aggregation": "token_mean"}
    changes = [{name: values[1]} for name, values in SWITCHES.items()]
    changes += [{"advantage": kind} for kind in ADVANTAGES[:-1]] + [{"discount": 0.9}, {"gae_lambda": 0.9}]
    changes += [{"ratio": "sequence"}, {"aggregation": "sequence_mean"}]
    ragged = make_ragged()
    losses = {float(outcome(policy_gradient(**(first | change)), ragged).loss) for change in [{}, *changes]}
    assert len(losses) == 1 + len(changes)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(2))
def test_no_cut_into_micro_batches_changes_anything(advantage: str, ratio: str, aggregation: str, seed: int) -> None:
    objective = policy_gradient(advantage=advantage, ratio=ratio, aggregation=aggregation, **ALL_ON)
    assert_no_cut_matters(objective, make_ragged(seed, sampler_weight=True), seed)


@pytest.mark.parametrize("seed", range(3))
def test_gspo_is_the_loss_of_whole_answers(seed: int) -> None:
    """Equation 5 of Zheng et al.: mean over answers of min(s A, clip(s) A), s the geometric mean of the ratios."""
    ragged = make_ragged(seed)
    objective = PolicyGradient(
        "group_norm", ratio="sequence", aggregation="sequence_mean", clip_low=0.05, clip_high=0.1
    )
    found = outcome(objective, ragged)
    total = torch.zeros((), dtype=torch.float64)
    for index, length in enumerate(ragged.lengths):
        if length:
            tokens = list(ragged.tokens_of(index))
            s = ((ragged.log_probs[tokens] - ragged.old[tokens]).sum() / length).exp()
            advantage = transformed(ragged, "group_norm", index)
            total = total - torch.minimum(s * advantage, s.clamp(0.95, 1.1) * advantage)
    total = total / len(ragged.lengths)
    torch.testing.assert_close(found.loss, total.detach(), rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(total, ragged.log_probs)
    torch.testing.assert_close(found.by_log_probs, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("clips", [(0.2, 0.28), (3e-4, 4e-4), (0.0, 0.0)])
def test_on_policy_the_gradient_is_the_policy_gradient(ratio: str, clips: tuple[float, float]) -> None:
    """A ratio of exactly 1, nothing clipped, and the derivative is - A, at whatever clip."""
    ragged = make_ragged()
    ragged.old = ragged.log_probs.detach()
    objective = policy_gradient(
        advantage="group_norm", ratio=ratio, clip_low=clips[0], clip_high=clips[1], clip_dual=3.0
    )  # fmt: skip
    found = outcome(objective, ragged)
    assert found.statistics["ratio"].tolist() == [1.0] * len(ragged.lengths)
    assert not found.statistics["ratio_clipped_share"].any() and not found.statistics["kl_old"].any()
    advantages = objective.prepare(ragged.rollout).tokens["advantage"]
    torch.testing.assert_close(found.by_log_probs, -advantages / sum(ragged.lengths), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip_dual", [math.inf, 3.0])
@pytest.mark.parametrize("of_token", [1.1, 0.9])
def test_long_answers_stay_finite(ratio: str, aggregation: str, clip_dual: float, of_token: float) -> None:
    for reward in (1.0, -1.0):
        ragged = long_answer(torch.full((8192,), of_token), reward=reward)
        objective = policy_gradient(
            advantage="group_mean", ratio=ratio, aggregation=aggregation, clip_dual=clip_dual, kl_coef=0.1
        )
        found = outcome(objective, ragged)
        assert found.loss.isfinite() and found.by_log_probs.isfinite().all() and found.by_log_probs.any()
        assert float(found.statistics["ratio"][0]) == pytest.approx(of_token, rel=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_single_token_does_not_overflow(sign: float) -> None:
    """A log-prob that went from -1000 to -1, or back."""
    ragged = long_answer(torch.ones(2))
    ragged.old = ragged.log_probs.detach() - torch.tensor([sign * 1000.0, 0.0, 0.0])
    for advantage, ratio in itertools.product(("group_norm", "gae"), RATIOS):
        found = outcome(policy_gradient(advantage=advantage, ratio=ratio), ragged)
        assert found.loss.isfinite() and found.by_log_probs.isfinite().all()


@pytest.mark.parametrize("advantage", ADVANTAGES[:3])
def test_answers_that_say_nothing_have_no_advantage(advantage: str) -> None:
    """Those with equal rewards; one that is alone has its reward, and each answer the same for all its tokens."""
    ragged = make_ragged()
    found = policy_gradient(advantage=advantage).prepare(ragged.rollout).tokens["advantage"]
    for index, group in enumerate(ragged.groups):
        of_answer = found[list(ragged.tokens_of(index))]
        assert len(set(of_answer.tolist())) <= 1
        if group in (EQUAL_GROUP, LONE_GROUP):
            assert (of_answer == (ragged.rewards[index] if group == LONE_GROUP else 0.0)).all()


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_the_highest_entropies_are_chosen_over_the_whole_rollout(share: float) -> None:
    ragged = make_ragged()
    objective = PolicyGradient("reinforce_plus_plus", entropy_top_share=share)
    found = objective.prepare(ragged.rollout).tokens["advantage"]
    order = sorted(range(len(found)), key=lambda t: -float(ragged.old_entropy[t]))
    count = max(1, round(share * len(found)))
    assert found[order[:count]].all() and not found[order[count:]].any()
    every = replace(objective, entropy_top_share=1.0).prepare(ragged.rollout).tokens["advantage"]
    assert torch.equal(found[order[:count]], every[order[:count]]), "what is left keeps the advantage it had"


def test_equal_entropies_are_chosen_together() -> None:
    rollout = replace(make_ragged().rollout, old_entropy=None)
    entropy = torch.zeros(int(rollout.offsets[-1]))
    entropy[[3, 5, 8]] = 1.0
    objective = PolicyGradient("reinforce_plus_plus", entropy_top_share=1e-3)
    found = objective.prepare(replace(rollout, old_entropy=entropy)).tokens["advantage"]
    assert found.nonzero().flatten().tolist() == [3, 5, 8]


def test_returns_are_what_the_critic_learns() -> None:
    """Not standardised, and there for `gae` alone; for an empty rollout as well."""
    ragged = make_ragged()
    prepared = PolicyGradient("gae", kl_in_reward=0.1).prepare(ragged.rollout)
    penalty, rewards = (0.1 * (ragged.old - ragged.reference)).tolist(), ragged.rewards
    for index in range(len(ragged.lengths)):
        tokens = ragged.tokens_of(index)
        for t in tokens:
            wanted = rewards[index] - math.fsum(penalty[k] for k in range(t, tokens.stop))
            assert float(prepared.tokens["return"][t]) == pytest.approx(wanted, rel=1e-12, abs=1e-13)
    assert "return" not in PolicyGradient("reinforce_plus_plus").prepare(ragged.rollout).tokens
    none = torch.zeros(0, dtype=torch.float64)
    empty = replace(ragged, lengths=[], rewards=[], groups=[], old=none, reference=none, old_entropy=none, values=none)
    for advantage in ADVANTAGES:
        tokens_of = policy_gradient(advantage=advantage, entropy_top_share=0.5).prepare(empty.rollout).tokens
        assert tokens_of["advantage"].shape == (0,)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_micro_batch_without_sequences_or_without_tokens_has_a_loss_of_zero(aggregation: str, ratio: str) -> None:
    ragged = make_ragged(sampler_weight=True)
    empty = [index for index, length in enumerate(ragged.lengths) if not length]
    objective = policy_gradient(advantage="group_norm", aggregation=aggregation, ratio=ratio, **ALL_ON)
    for members in ([], empty):
        found = outcome(objective, ragged, [members])
        assert found.loss == 0.0 and not found.by_log_probs.any() and not found.by_entropy.any()
    whole = replace(ragged.batch(objective.prepare(ragged.rollout), empty), num_tokens=0)
    assert not objective(whole)[0].any(), "nor has a mini-batch of empty answers alone"


@pytest.mark.parametrize("level", ["sum", "none"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("log_z", PARTITIONS)
@pytest.mark.parametrize("advantage", ["gae", "group_norm"])
def test_the_joint_loss_is_the_sum_of_both(level: str, normalization: str, log_z: str, advantage: str) -> None:
    for seed, coefficient in enumerate((0.0, 0.3, 1.0)):
        ragged = make_ragged(seed, sampler_weight=bool(seed % 2))
        balance = flowrl(normalization, "group_norm", level, "max", log_z, "reference", math.inf)
        part = policy_gradient(advantage=advantage, **ALL_ON)
        one, other = expected_of(ragged, part), expected_of_balance(ragged, balance)
        expected = Expected(
            one.loss + coefficient * other.loss,
            [a + coefficient * b for a, b in zip(one.by_log_probs, other.by_log_probs, strict=True)],
            one.by_entropy,
            [coefficient * value for value in other.by_log_z],
        )
        joint = GFlowNetPPO(part, balance, coefficient)
        assert_as_expected(outcome(joint, ragged), expected, (joint, seed))
        assert_no_cut_matters(joint, ragged, seed)
        assert outcome(joint, ragged, [[]]).loss == 0.0


def test_what_is_needed() -> None:
    assert PolicyGradient("group_norm").needs == Needs()
    assert PolicyGradient("group_norm", kl_coef=0.1).needs == Needs(reference=True)
    assert PolicyGradient("gae", kl_in_reward=0.1).needs == Needs(old=True, reference=True, values=True)
    assert PolicyGradient("group_norm", entropy_coef=0.1).needs == Needs(entropy="differentiable")
    assert PolicyGradient("group_norm", entropy_top_share=0.5).needs == Needs(old=True, old_entropy=True)
    balance = FlowRL(1.0, importance=ImportanceWeight(level="none"))
    assert GFlowNetPPO(PolicyGradient("gae"), balance).needs == Needs(reference=True, log_z=True, values=True)
    assert GFlowNetPPO(PolicyGradient("gae", **ALL_ON), balance).needs == Needs(
        old=True, reference=True, entropy="differentiable", old_entropy=True, log_z=True, values=True
    )


@pytest.mark.parametrize("clip", [0.2, math.inf])
def test_the_critics_loss_is_the_greater_one(clip: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    loss = value_loss(values, old, returns, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    for v, o, r, found, slope in zip(*(t.tolist() for t in (values, old, returns, loss, gradient)), strict=True):
        plain, near = (v - r) ** 2 / 2, (o + min(clip, max(-clip, v - o)) - r) ** 2 / 2
        assert found == pytest.approx(max(plain, near), rel=1e-12)
        held = abs(v - o) > clip and near > plain
        assert slope == pytest.approx(0.0 if held else v - r, rel=1e-12, abs=1e-14)
