"""Updates on one rank: against transformers, log Z's own settings, what is not finite, objectives of the user's own."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import Config, UserError, check_config, load_config
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, wrap_for_training
from megatron_flowrl.model.objective import build_objective, needs_old_pass
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.model.partition_function import PartitionFunction
from megatron_flowrl.objectives.batch import Batch, Needs, Prepared, Rollout
from megatron_flowrl.platform import Platform
from megatron_flowrl.training.experience import (
    Experience,
    gather_experience,
    with_old_pass,
    with_reference_pass,
)
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.schedule import build_schedule
from megatron_flowrl.training.update import Updater, UpdateResult
from tests.tiny_models import random_sequences, save_model

SEQUENCES = random_sequences(8, longest=30, seed=5)
REWARDS = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.25]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("model"))


@dataclass
class Trainer:
    """A policy and all that an update needs, on one rank."""

    config: Config
    model: ParallelModel
    optimizer: Optimizer
    updater: Updater
    experience: Experience
    update: Callable[..., UpdateResult]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.modules[0].named_parameters()}


@pytest.fixture
def trainer(folder: Path, one_rank_platform: Platform) -> Callable[..., Trainer]:
    def make(**settings: Any) -> Trainer:
        given = {
            "model.path": str(folder),
            "model.make_vocab_size_divisible_by": 8,
            "precision.dtype": "float32",
            "optimizer.lr": 1e-3,
            "optimizer.lr_warmup_iters": 0,
        } | {key.replace("__", "."): value for key, value in settings.items()}
        config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])
        check_config(config)
        architecture, device = read_architecture(folder), one_rank_platform.device
        objective = build_objective(config)
        model = build_parallel_model(architecture, config, one_rank_platform, log_z=objective.needs.log_z)
        load_weights(model, open_source(config, architecture))
        model = wrap_for_training(model, config)
        optimizer = Optimizer(model, config)
        build_schedule(optimizer.megatron, config.optimizer).step(1)
        experience = gather_experience(SEQUENCES, REWARDS, GROUPS, config)
        packing = plan([len(s) for s in experience.sequences], packing_rules(config, architecture, 1))
        experience = with_old_pass(experience, model.chunks, packing, config, device, objective.needs)
        experience = with_reference_pass(experience, model.chunks, packing, config, device)
        updater = Updater(model, optimizer, objective, config, device)

        def update(changed: Experience | None = None) -> UpdateResult:
            return updater.update(updater.prepare(changed or experience, packing, step=1), 0)

        return Trainer(config, model, optimizer, updater, experience, update)

    return make


@pytest.mark.parametrize("prompt_tokens", ["all", "drop_last"])
def test_policy_and_log_z_gradients_equal_transformers(
    prompt_tokens: str, trainer: Callable[..., Trainer], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlowRL with every gradient path: through log Z into the trunk, and through the log-probs."""
    made = trainer(log_z__prompt_tokens=prompt_tokens, flowrl__reference="none", flowrl__beta=2.0)
    monkeypatch.setattr(made.optimizer, "step", lambda *, skip: _Kept())  # gradients stay where they are
    result = made.update()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = PartitionFunction(48)
    head.initialize(made.config.seed)
    loss = torch.zeros(())
    for sequence, reward in zip(SEQUENCES, REWARDS, strict=True):
        tokens, start = torch.tensor([[*sequence.prompt, *sequence.response]]), len(sequence.prompt)
        output = model(tokens, output_hidden_states=True)
        table = torch.log_softmax(output.logits[0], dim=-1)[start - 1 : -1]
        log_prob = table.gather(1, tokens[0, start:, None]).sum()
        averaged = max(1, start - 1) if prompt_tokens == "drop_last" else start
        log_z = head(output.hidden_states[-1][:, :averaged].mean(dim=1))[0]
        loss = loss + ((log_z + log_prob - 2.0 * reward) / max(1, len(sequence.response))) ** 2 / len(SEQUENCES)
    loss.backward()

    torch.testing.assert_close(result.metrics["loss"], float(loss), rtol=1e-5, atol=0.0)
    ours = made.model.modules[0]
    theirs = dict(model.named_parameters())
    pairs = {f"log_z.{name}": p.grad for name, p in head.named_parameters()} | {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"].grad,
        "decoder.layers.0.mlp.linear_fc2.weight": theirs["model.layers.0.mlp.down_proj.weight"].grad,
        "decoder.final_layernorm.weight": theirs["model.norm.weight"].grad,
    }
    for name, expected in pairs.items():
        assert expected is not None and expected.any()
        found = ours.get_parameter(name).main_grad[: len(expected)]
        assert float((found - expected).abs().max() / expected.abs().max()) <= 2e-5, name


@dataclass(frozen=True)
class _Kept:
    updated: bool = True
    grad_norm: float = 0.0
    grad_norms: tuple[()] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grad_norms", {})


def test_a_detached_log_z_leaves_the_trunk_alone(trainer: Callable[..., Trainer]) -> None:
    """Without it the trunk learns through log Z too: the embedding of a token that only prompts have moves more."""
    attached, detached = (
        trainer(log_z__detach=detach, optimizer__clip_grad=0.0).update().metrics for detach in (False, True)
    )
    assert attached["loss"] == detached["loss"]
    assert attached["grad_norm_log_z"] == pytest.approx(detached["grad_norm_log_z"], rel=1e-6)
    assert attached["grad_norm_policy"] != pytest.approx(detached["grad_norm_policy"], rel=1e-3)


def test_log_z_has_a_learning_rate_of_its_own(trainer: Callable[..., Trainer]) -> None:
    made = trainer(log_z__lr=0.0, log_z__weight_decay=0.3)
    before = made.weights()
    assert made.update().updated
    after = made.weights()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("log_z.")}
    heads = [group for group in made.optimizer.megatron.param_groups if group.get("part") == "log_z"]
    others = [group for group in made.optimizer.megatron.param_groups if group.get("part") != "log_z"]
    assert {(group["lr"], group["weight_decay"]) for group in heads} == {(0.0, 0.3), (0.0, 0.0)}  # biases do not decay
    assert {(group["lr"], group["weight_decay"]) for group in others} == {(1e-3, 0.1), (1e-3, 0.0)}


def test_norms_of_policy_and_log_z_make_the_whole(trainer: Callable[..., Trainer]) -> None:
    metrics = trainer().update().metrics
    parts = metrics["grad_norm_policy"], metrics["grad_norm_log_z"]
    assert min(parts) > 0 and metrics["grad_norm"] == pytest.approx(math.hypot(*parts))


def test_what_is_not_finite_is_left_out_counted_and_said(
    trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_flowrl"), "propagate", True)
    made = trainer()
    before = made.weights()
    reference = made.experience.reference
    assert reference is not None
    broken = replace(reference, log_probs=reference.log_probs.clone().index_fill_(0, torch.tensor([7]), -math.inf))
    result = made.update(replace(made.experience, reference=broken))
    assert not result.updated and result.metrics["skipped_steps"] == 1.0
    assert "step 1, mini-batch 0: a loss is not finite; not updated" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in made.weights().items())
    result = made.update()  # goes on as if nothing had been
    assert result.updated and result.metrics["skipped_steps"] == 1.0
    fresh = trainer()
    fresh.update()
    assert all(torch.equal(value, made.weights()[name]) for name, value in fresh.weights().items())


def test_training_on_one_batch_lowers_the_loss(trainer: Callable[..., Trainer]) -> None:
    made = trainer()
    losses = [made.update().metrics["loss"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


class Users:
    """The smallest objective there is: the likelihood of rewarded answers."""

    needs = Needs()
    statistics = ("reward",)

    def __init__(self, config: Config) -> None:
        self.beta = config.flowrl.beta

    def prepare(self, rollout: Rollout) -> Prepared:
        return Prepared(sequences={"reward": rollout.rewards})

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        reward = batch.sequences["reward"].float()
        return -reward * batch.sum_tokens(batch.log_probs) / batch.num_sequences, {"reward": reward}


NOT_CALLABLE = 3


def nothing(config: Config) -> object:
    return object()


def test_an_objective_of_the_users_own(trainer: Callable[..., Trainer]) -> None:
    made = trainer(objective__name="tests.training.test_update.Users")
    assert made.update().metrics["reward"] == pytest.approx(sum(REWARDS) / len(REWARDS))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no.such.module", "cannot be imported: No module named 'no'"),
        ("tests.training.test_update.Missing", "cannot be imported: module 'tests.training.test_update' has no"),
        ("tests.training.test_update.NOT_CALLABLE", "is a int; it must be callable"),
        ("tests.training.test_update.nothing", "made a object, which has no needs"),
    ],
)
def test_an_objective_that_cannot_be_had_is_named(name: str, problem: str) -> None:
    with pytest.raises(UserError) as raised:
        build_objective(load_config(None, [f"objective.name={name}"]))
    assert name in str(raised.value) and problem in str(raised.value)


class TestExperience:
    def gather(self, *overrides: str, rewards: list[float] | None = None) -> Experience:
        responses = (3, 4, 5, 6)
        sequences = [TokenSequence((1, 2), tuple(range(length))) for length in responses]
        config = load_config(None, list(overrides))
        log_probs = [[float(-i)] * len(s.response) for i, s in enumerate(sequences)]
        return gather_experience(sequences, rewards or [1.0, 1.0, 0.0, 1.0], [7, 7, 3, 3], config, log_probs)

    def test_all_answers_are_kept(self) -> None:
        experience = self.gather()
        assert len(experience.sequences) == 4 and experience.offsets.tolist() == [0, 3, 7, 12, 18]

    def test_groups_without_differences_are_dropped(self) -> None:
        experience = self.gather("objective.degenerate_groups=drop")
        assert [len(s.response) for s in experience.sequences] == [5, 6]
        assert experience.rewards.tolist() == [0.0, 1.0] and experience.groups.tolist() == [3, 3]
        assert experience.sampler_log_probs is not None
        assert experience.sampler_log_probs.tolist() == [-2.0] * 5 + [-3.0] * 6

    def test_none_may_be_left(self) -> None:
        experience = self.gather("objective.degenerate_groups=drop", rewards=[0.5] * 4)
        assert experience.sequences == [] and experience.offsets.tolist() == [0]

    def test_long_answers_lose_reward_after_groups_were_judged(self) -> None:
        settings = ("objective.overlong_buffer=4", "generation.max_tokens=8", "objective.degenerate_groups=drop")
        assert self.gather(*settings).rewards.tolist() == [-0.25, 0.5]

    def test_a_reward_that_is_no_number_is_named(self) -> None:
        with pytest.raises(UserError, match="answer number 3 has the reward nan"):
            self.gather(rewards=[1.0, 0.0, math.nan, 1.0])

    @pytest.mark.parametrize(
        ("overrides", "needed"),
        [
            ((), False),
            (("objective.force_old_pass=true",), True),
            (("flowrl.log_z=group",), True),
            (("sampler_correction.level=token",), True),
            (("objective.name=grpo",), False),
            (("objective.name=grpo", "policy_gradient.entropy_top_share=0.2"), True),
            (("objective.name=reinforce_plus_plus",), True),
        ],
    )
    def test_old_pass_where_the_only_update_does_not_have_it(self, overrides: tuple[str, ...], needed: bool) -> None:
        config = load_config(None, ["model.path=x", *overrides])
        check_config(config)
        needs = build_objective(config).needs
        assert needs_old_pass(needs, 1, config) == needed
        assert needs_old_pass(needs, 2, config)


def packing_rules_of_one_rank() -> Any:
    from megatron_flowrl.data.packing import PackingRules

    return PackingRules(data_parallel_size=1, tokens_per_micro_batch=64)
