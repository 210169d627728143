"""The reference: log-probs equal to the policy's while the weights are, and a policy that comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import RandomSource, SafetensorsSource
from megatron_flowrl.config import Config, load_config
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, wrap_for_training
from megatron_flowrl.model.gpt import TokenLogProbs
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import Platform
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import forward_backward, forward_only, gather_tokens, local_batches
from megatron_flowrl.training.reference import Reference, build_reference
from tests.tiny_models import random_sequences, save_model

SEQUENCES = random_sequences(9, seed=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_tied", tmp_path_factory.mktemp("model"))


class Run:
    """A policy under training and its reference."""

    def __init__(self, folder: Path, platform: Platform, *overrides: str) -> None:
        self.config: Config = load_config(None, [f"model.path={folder}", "optimizer.lr=0.01", *overrides])
        architecture = read_architecture(folder)
        source = SafetensorsSource(folder, architecture)
        bare = build_parallel_model(architecture, self.config, platform)
        load_weights(bare, source)
        self.policy: ParallelModel = wrap_for_training(bare, self.config)
        self.optimizer = Optimizer(self.policy, self.config)
        self.reference: Reference = build_reference(self.policy, source, self.config, platform)
        packing = plan([len(s) for s in SEQUENCES], packing_rules(self.config, architecture, 1))
        self.batches: list[PackedBatch] = local_batches(SEQUENCES, packing, 0, platform.device)

    def policy_log_probs(self) -> torch.Tensor:
        return self._log_probs(self.policy.chunks)

    def reference_log_probs(self) -> torch.Tensor:
        with self.reference.active() as chunks:
            return self._log_probs(chunks)

    def _log_probs(self, chunks: list[torch.nn.Module]) -> torch.Tensor:
        outputs = forward_only(chunks, self.batches, self.config.log_prob)
        return gather_tokens(SEQUENCES, self.batches, outputs, entropy=False).log_probs

    def step(self) -> None:
        self.optimizer.zero_grad()
        forward_backward(self.policy.chunks, self.batches, self.config.log_prob, lambda out, _: out.log_probs.sum())
        assert self.optimizer.step().updated

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for module in self.policy.modules for p in module.parameters()]


@pytest.fixture(params=["resident", "host", "host_overlap"])
def run(request: pytest.FixtureRequest, folder: Path, one_rank_platform: Platform) -> Run:
    overlap = ["ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"] if "overlap" in request.param else []
    placement = f"reference.placement={request.param.split('_')[0]}"
    return Run(folder, one_rank_platform, placement, *overlap)


def test_equal_weights_give_equal_bits(run: Run) -> None:
    assert torch.equal(run.policy_log_probs(), run.reference_log_probs())


def test_policy_comes_back_bit_for_bit(run: Run) -> None:
    run.step()
    before, log_probs = run.weights(), run.policy_log_probs()
    run.reference_log_probs()
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights(), strict=True))
    assert torch.equal(run.policy_log_probs(), log_probs)


def test_reference_stays_while_the_policy_learns(run: Run) -> None:
    first = run.reference_log_probs()
    for _ in range(3):
        run.step()
        assert torch.equal(run.reference_log_probs(), first)
        assert not torch.equal(run.policy_log_probs(), first)


def test_training_is_the_same_with_reference_passes_between(folder: Path, one_rank_platform: Platform) -> None:
    undisturbed, disturbed = (Run(folder, one_rank_platform, "reference.placement=host") for _ in range(2))
    for _ in range(3):
        undisturbed.step()
        disturbed.step()
        disturbed.reference_log_probs()
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.weights(), disturbed.weights(), strict=True))


def test_policy_comes_back_after_an_error(folder: Path, one_rank_platform: Platform) -> None:
    run = Run(folder, one_rank_platform, "reference.placement=host")
    run.step()
    before = run.weights()
    with pytest.raises(KeyboardInterrupt), run.reference.active():
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights(), strict=True))


def test_reference_takes_its_weights_from_the_source_not_from_the_policy(
    folder: Path, one_rank_platform: Platform
) -> None:
    """As after a restart, when the policy has moved on and the reference has not."""
    run = Run(folder, one_rank_platform, "reference.placement=host")
    expected = run.reference_log_probs()
    architecture = run.policy.architecture
    load_weights(run.policy, RandomSource(architecture, seed=3))
    later = build_reference(run.policy, SafetensorsSource(folder, architecture), run.config, one_rank_platform)
    with later.active() as chunks:
        assert torch.equal(run._log_probs(list(chunks)), expected)


def test_a_pass_says_when_its_micro_batches_are_done(folder: Path, one_rank_platform: Platform) -> None:
    """Before gradients are reduced, once a pass, and Megatron's settings are as they were afterwards."""
    run = Run(folder, one_rank_platform)
    settings, events = run.policy.transformer_config, list[str]()
    finalize = settings.finalize_model_grads_func

    def reduce(*args: object, **kwargs: object) -> None:
        events.append("reduced")
        finalize(*args, **kwargs)

    settings.finalize_model_grads_func = reduce

    def loss(output: TokenLogProbs, batch: PackedBatch) -> torch.Tensor:
        events.append("loss")
        return output.log_probs.sum()

    class Listening:
        def micro_batch(self) -> None:
            events.append("forward")

        def end(self) -> None:
            events.append("done")

    forward_backward(run.policy.chunks, run.batches, run.config.log_prob, loss, listener=Listening())
    assert events == ["forward", "loss"] * len(run.batches) + ["done", "reduced"]
    assert settings.finalize_model_grads_func is reduce
    events.clear()
    forward_only(run.policy.chunks, run.batches, run.config.log_prob, listener=Listening())
    assert events == ["forward"] * len(run.batches) + ["done"]


def test_empty_responses_are_scored_as_nothing(folder: Path, one_rank_platform: Platform) -> None:
    run = Run(folder, one_rank_platform)
    sequences = [TokenSequence((5, 6), ()), TokenSequence((7,), ())]
    packing = plan([2, 1], packing_rules(run.config, run.policy.architecture, 1))
    batches = local_batches(sequences, packing, 0, one_rank_platform.device)
    outputs = forward_only(run.policy.chunks, batches, run.config.log_prob)
    assert gather_tokens(sequences, batches, outputs, entropy=False).log_probs.shape == (0,)
