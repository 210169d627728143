"""FlowRL's Proposition 1 and its neighbours, on policies small enough that every answer can be enumerated.

A policy is a table of softmax probabilities: one token of twelve, or up to three tokens of three. Expectations are sums
over all answers; half of FlowRL's loss is differentiated, which is delta^2. The target is pi_ref exp(beta r) / Z*.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import Batch, Rollout
from megatron_flowrl.objectives.flowrl import FlowRL
from megatron_flowrl.objectives.importance import ImportanceWeight

BETA = 1.7
EXACT: dict[str, Any] = {"length_normalization": "none", "reward": "raw"}
SCALED: dict[str, Any] = {"length_normalization": "residual", "reward": "raw"}
PUBLISHED: dict[str, Any] = {"length_normalization": "log_probs", "reward": "raw"}
UNCLIPPED = ImportanceWeight(clip="none")


@dataclass(frozen=True)
class Table:
    """Answers over a vocabulary whose token 0 ends them; one of `longest` tokens ends in any case."""

    answers: list[tuple[int, ...]]
    prefixes: list[tuple[int, ...]]
    vocabulary: int

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(answer) for answer in self.answers])

    @property
    def sequence_of(self) -> Tensor:
        return torch.arange(len(self.answers)).repeat_interleave(self.lengths)

    def token_log_probs(self, logits: Tensor) -> Tensor:
        """Logits by prefix [P, V] -> of the tokens of all answers, end to end."""
        places = [(self.prefixes.index(a[:t]), a[t]) for a in self.answers for t in range(len(a))]
        rows, columns = torch.tensor(places).unbind(1)
        return logits.log_softmax(-1)[rows, columns]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of whole answers."""
        tokens = self.token_log_probs(logits)
        return tokens.new_zeros(len(self.answers)).index_add(0, self.sequence_of, tokens)

    def logits_of(self, log_probs: Tensor) -> Tensor:
        """The policy with these probabilities of answers: each prefix's mass by the token that follows."""
        mass = torch.zeros(len(self.prefixes), self.vocabulary, dtype=torch.float64)
        for answer, probability in zip(self.answers, log_probs.exp().tolist(), strict=True):
            for t, token in enumerate(answer):
                mass[self.prefixes.index(answer[:t]), token] += probability
        return mass.log()


def make_table(vocabulary: int, longest: int) -> Table:
    prefixes = [p for n in range(longest) for p in itertools.product(range(1, vocabulary), repeat=n)]
    answers = [(*p, token) for p in prefixes for token in range(vocabulary) if token == 0 or len(p) == longest - 1]
    return Table(answers, prefixes, vocabulary)


TABLES = {"one token": make_table(12, 1), "up to three tokens": make_table(3, 3)}


@dataclass(frozen=True)
class Case:
    """A table with a policy, the policy that answers are from, a reference, rewards and what they aim at."""

    table: Table
    logits: Tensor
    drawn: Tensor
    reference: Tensor
    rewards: Tensor

    @property
    def flow(self) -> Tensor:
        """log of pi_ref exp(beta r) by answer."""
        return self.table.log_probs(self.reference) + BETA * self.rewards

    @property
    def log_z(self) -> float:
        """log Z*."""
        return float(self.flow.logsumexp(0))

    def divergence(self, target: Tensor) -> Tensor:
        """KL(pi || target), of log-probs by answer."""
        policy = self.table.log_probs(self.logits)
        return (policy.exp() * (policy - target)).sum()


def make_case(name: str, seed: int = 0, *, off_policy: bool = False) -> Case:
    table = TABLES[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (3, len(table.prefixes), table.vocabulary)
    logits, drawn, reference = torch.randn(shape, generator=generator, dtype=torch.float64)
    rewards = torch.rand(len(table.answers), generator=generator, dtype=torch.float64)
    return Case(table, logits.requires_grad_(), drawn if off_policy else logits.detach().clone(), reference, rewards)


def half_expected_loss(
    case: Case, objective: FlowRL, log_z: Tensor | float = 0.0, groups: list[tuple[int, ...]] | None = None
) -> Tensor:
    """The sum over groups of answers of their probability times half the mean of their losses; alone unless given."""
    if groups is None:
        groups = [(index,) for index in range(len(case.table.answers))]
    members = [index for group in groups for index in group]
    tokens = [t for index in members for t in torch.nonzero(case.table.sequence_of == index).flatten().tolist()]
    lengths = case.table.lengths[members]
    sequence_of = torch.arange(len(members)).repeat_interleave(lengths)
    policy, old, reference = (
        case.table.token_log_probs(logits)[tokens] for logits in (case.logits, case.drawn, case.reference)
    )
    size = len(groups[0])
    rollout = Rollout(
        rewards=case.rewards[members],
        groups=torch.arange(len(groups)).repeat_interleave(size),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        old_log_probs=old,
        reference_log_probs=reference,
    )
    batch = Batch(
        log_probs=policy,
        old_log_probs=old,
        reference_log_probs=reference,
        log_z=torch.as_tensor(log_z, dtype=torch.float64).expand(len(members)),
        sum_tokens=lambda values: values.new_zeros(len(members)).index_add(0, sequence_of, values),
        sequence_of=sequence_of,
        lengths=lengths.double(),
        num_sequences=size,  # each group is a mini-batch of its own
        num_tokens=len(tokens),
        sequences=objective.prepare(rollout).sequences,
    )
    probabilities = case.table.log_probs(case.drawn)[members].view(-1, size).sum(1).exp()
    losses, _ = objective(batch)
    return (probabilities.repeat_interleave(size) * losses).sum() / 2


def by_logits(case: Case, value: Tensor) -> Tensor:
    return torch.autograd.grad(value, case.logits)[0]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert wanted.abs().max() > 1e-3, "else nothing is compared"


each_table = pytest.mark.parametrize("name", TABLES)


@each_table
def test_the_tables_are_what_they_are_said_to_be(name: str) -> None:
    case = make_case(name)
    lengths = set(case.table.lengths.tolist())
    assert lengths == ({1} if name == "one token" else {1, 2, 3}) and len(case.table.answers) >= 11
    policy = case.table.log_probs(case.logits).detach()
    assert float(policy.exp().sum()) == pytest.approx(1.0, rel=1e-14)
    torch.testing.assert_close(case.table.log_probs(case.table.logits_of(policy)), policy, rtol=1e-12, atol=0.0)


@each_table
@pytest.mark.parametrize("away", [0.0, -1.5, 4.0])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_gradient_is_that_of_the_divergence_from_the_target(name: str, away: float, off_policy: bool) -> None:
    """Proposition 1, whatever log Z says; also for another policy's answers, which w then weighs, unclipped."""
    case = make_case(name, off_policy=off_policy)
    found = by_logits(case, half_expected_loss(case, FlowRL(BETA, importance=UNCLIPPED, **EXACT), case.log_z + away))
    close(found, by_logits(case, case.divergence(case.flow - case.log_z)))


@each_table
def test_without_a_reference_the_target_is_the_reward_alone(name: str) -> None:
    case = make_case(name)
    objective = FlowRL(BETA, reference="none", log_z="none", **EXACT)
    target = (BETA * case.rewards).log_softmax(0)
    close(by_logits(case, half_expected_loss(case, objective)), by_logits(case, case.divergence(target)))


@each_table
def test_with_the_old_policy_as_reference_the_target_is_a_tilt_of_it(name: str) -> None:
    case = make_case(name, off_policy=True)
    objective = FlowRL(BETA, reference="old", importance=UNCLIPPED, **EXACT)
    target = (case.table.log_probs(case.drawn) + BETA * case.rewards).log_softmax(0)
    close(by_logits(case, half_expected_loss(case, objective, 0.4)), by_logits(case, case.divergence(target)))


@each_table
@pytest.mark.parametrize("away", [0.0, -1.5, 4.0])
def test_log_z_is_exact_only_where_the_policy_is(name: str, away: float) -> None:
    """Its derivative is log Z - log Z* + KL(pi || target): zero below log Z*, by as much as the policy is off."""
    case = make_case(name)
    log_z = torch.tensor(case.log_z + away, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(half_expected_loss(case, FlowRL(BETA, **EXACT), log_z), log_z)
    divergence = case.divergence(case.flow - case.log_z).detach()
    assert divergence > 0.1
    torch.testing.assert_close(found, away + divergence, rtol=1e-8, atol=1e-10)


def pairs(case: Case) -> list[tuple[int, ...]]:
    """Every group of two answers."""
    return list(itertools.product(range(len(case.table.answers)), repeat=2))


@each_table
@pytest.mark.parametrize(("reward", "sharpness"), [("leave_one_out", 1.0), ("group_mean", 0.5)])
def test_what_a_mean_of_the_group_does_to_the_target(name: str, reward: Any, sharpness: float) -> None:
    """Less the others' mean: nothing. Less the mean of all G: beta becomes beta (1 - 1/G)."""
    case = make_case(name)
    objective = FlowRL(BETA, length_normalization="none", reward=reward)
    found = by_logits(case, half_expected_loss(case, objective, 0.3, pairs(case)))
    target = (case.table.log_probs(case.reference) + sharpness * BETA * case.rewards).log_softmax(0)
    close(found, by_logits(case, case.divergence(target)))


@each_table
def test_the_groups_log_z_leaves_the_direction_of_the_gradient(name: str) -> None:
    """It holds the answer itself, one of G, so that 1 - 1/G of the gradient is left; for G = 2 half of it."""
    case = make_case(name)
    found = by_logits(case, half_expected_loss(case, FlowRL(BETA, log_z="group", **EXACT), groups=pairs(case)))
    close(found, by_logits(case, case.divergence(case.flow - case.log_z)) / 2)


def at_target(name: str, target: Callable[[Case], Tensor]) -> Case:
    case = make_case(name)
    logits = case.table.logits_of(target(case))
    return Case(case.table, logits.requires_grad_(), logits.detach().clone(), case.reference, case.rewards)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_dividing_the_whole_residual_leaves_the_fixed_point(exponent: float) -> None:
    """At the target every residual is zero, and so is the gradient, by the policy and by log Z."""
    case = at_target("up to three tokens", lambda case: case.flow - case.log_z)
    for settings in (EXACT, SCALED):
        log_z = torch.tensor(case.log_z, dtype=torch.float64, requires_grad=True)
        value = half_expected_loss(case, FlowRL(BETA, length_exponent=exponent, **settings), log_z)
        by_policy, by_log_z = torch.autograd.grad(value, (case.logits, log_z))
        assert value < 1e-24 and by_policy.abs().max() < 1e-12 and by_log_z.abs() < 1e-12


@pytest.mark.parametrize("away", [-1.0, 0.0, 1.0])
def test_dividing_the_log_probs_moves_the_fixed_point(away: float) -> None:
    """At the target it pulls away from it, whatever log Z is; with answers of one token it does not."""
    case = at_target("up to three tokens", lambda case: case.flow - case.log_z)
    found = by_logits(case, half_expected_loss(case, FlowRL(BETA, **PUBLISHED), case.log_z + away))
    assert found.abs().max() > 1e-3
    short = at_target("one token", lambda case: case.flow - case.log_z)
    found = by_logits(short, half_expected_loss(short, FlowRL(BETA, **PUBLISHED), short.log_z + away))
    assert found.abs().max() < 1e-12


def tilted_by_length(case: Case, log_z: float) -> Tensor:
    """log of pi_ref exp(|y| (beta r - log Z)) by answer."""
    return case.table.log_probs(case.reference) + case.table.lengths * (BETA * case.rewards - log_z)


def normalizer(case: Case) -> float:
    """The log Z at which that sums to 1, by bisection: it falls with log Z."""
    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted_by_length(case, middle).logsumexp(0) > 0 else (low, middle)
    return low


def test_the_published_fixed_point_is_a_tilt_that_grows_with_length() -> None:
    """pi_ref exp(|y| (beta r - log Z)): zero for `log_probs`, and not for the exact residual."""
    case = at_target("up to three tokens", lambda case: tilted_by_length(case, normalizer(case)))
    log_z = normalizer(case)
    assert by_logits(case, half_expected_loss(case, FlowRL(BETA, **PUBLISHED), log_z)).abs().max() < 1e-12
    assert by_logits(case, half_expected_loss(case, FlowRL(BETA, **EXACT), log_z)).abs().max() > 1e-3


@each_table
@pytest.mark.parametrize("settings", [EXACT, SCALED])
def test_the_only_fixed_point_is_the_target_with_its_log_z(name: str, settings: dict[str, Any]) -> None:
    """Both learned together from wrong ones, all answers weighed as one fixed policy draws them."""
    case = make_case(name)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    objective = FlowRL(BETA, importance=ImportanceWeight(level="none"), **settings)
    optimizer = torch.optim.LBFGS(
        [case.logits, log_z], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = half_expected_loss(case, objective, log_z)
        value.backward()
        return value

    optimizer.step(loss)
    assert float(case.divergence(case.flow - case.log_z).detach()) < 1e-12
    assert float(log_z.detach()) == pytest.approx(case.log_z, abs=1e-6)
