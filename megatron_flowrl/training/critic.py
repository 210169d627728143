"""PPO's critic: a model of its own, with the policy's architecture and a value for the state before every token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import WeightSource
from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.config import Config
from megatron_flowrl.data.batch import PackedBatch
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, wrap_for_training
from megatron_flowrl.model.value_head import TokenValues, ValueRequest
from megatron_flowrl.objectives.policy_gradient import value_loss
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform import Platform
from megatron_flowrl.training.collect import Collected, agreed, members_of
from megatron_flowrl.training.experience import Experience, whole_plan
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import Listener, ask, gather_rows, local_batches, train_on
from megatron_flowrl.training.reductions import sequence_sums
from megatron_flowrl.training.schedule import build_schedule
from megatron_flowrl.training.update import Constants

_STATISTICS = ("loss", "value", "error", "squared_error", "clipped")  # sums over a sequence's tokens
_SAME = 1e-12  # share of its mean square below which a variance is the rounding of fp32 values


class Critic:
    """The value of a state is what its answer's reward will be, less what the policy's drift from pi_ref costs.

    Its body begins with the policy's weights, its head at 0.
    """

    def __init__(self, architecture: Architecture, source: WeightSource, config: Config, platform: Platform) -> None:
        self._config, self._device = config, platform.device
        model = build_parallel_model(architecture, config, platform, value_head=True)
        load_weights(model, source)
        self.model: ParallelModel = wrap_for_training(model, config)
        settings = _own_optimizer(config)
        self.optimizer = Optimizer(self.model, settings)
        self.schedule = build_schedule(self.optimizer.megatron, settings.optimizer)
        self.state = TrainingState(self.model, self.optimizer.megatron, self.schedule)  # for a checkpoint of its own

    def values(self, experience: Experience, packing: PackingPlan, listener: Listener | None = None) -> Tensor:
        """The value before each response token, fp32 [T], on every rank: a forward-only pass over the whole plan."""
        batches = whole_plan(experience.sequences, packing, self._device)
        outputs: list[TokenValues] = ask(self.model.chunks, batches, _request, listener=listener)
        flat, _ = gather_rows(experience.sequences, batches, [[output.values] for output in outputs], 1)
        return flat[0]

    def with_values(self, experience: Experience, packing: PackingPlan, listener: Listener | None = None) -> Experience:
        """The experience with the critic's values: what advantages are made from, and old values at the update."""
        return replace(experience, values=self.values(experience, packing, listener))

    def update(
        self, experience: Experience, constants: Constants, mini_batch: int, listener: Listener | None = None
    ) -> dict[str, float]:
        """One optimizer step towards the returns that the objective has made of the rewards.

        The loss is the mean of `value_loss` over all response tokens of the mini-batch. Where it, or a gradient, is not
        finite nothing is updated. Returns metrics, over the same tokens: explained variance is 1 - Var(R - V) / Var(R),
        and 0 where all returns are equal; the norm of the gradient is the one before clipping.
        """
        if experience.values is None:
            raise ValueError("the experience has no values: with_values comes first")
        members = members_of(constants.packing, mini_batch)
        found = Collected(_STATISTICS, members, self._device)
        tokens = sum(len(constants.sequences[index].response) for index in members)
        batches = local_batches(constants.sequences, constants.packing, mini_batch, self._device)
        self.optimizer.zero_grad()
        loss = partial(self._loss, constants, experience.values.to(self._device), tokens, found)
        train_on(self.model.chunks, batches, _request, loss, listener=listener)
        sums = {name: values.double() for name, values in found.everywhere().items()}
        finite = agreed(bool(sums["loss"].isfinite().all()), self._device)
        result = self.optimizer.step(skip=not finite)
        if not result.updated:
            what = "a value's loss" if not finite else f"the norm of the critic's gradient ({result.grad_norm})"
            logger.warning("step %d, mini-batch %d: %s is not finite; not updated", constants.step, mini_batch, what)
        return {
            **critic_metrics(sums, _returns_of(constants, members)),
            "grad_norm": result.grad_norm,
            "skipped_updates": float(not result.updated),
        }

    def _loss(
        self,
        constants: Constants,
        old_values: Tensor,
        num_tokens: int,
        found: Collected,
        output: TokenValues,
        batch: PackedBatch,
    ) -> Tensor:
        numbers = torch.tensor(batch.sequences, dtype=torch.int64, device=self._device)
        places = constants.starts[numbers][batch.sequence_of_row] + batch.response_index
        returns = constants.of_tokens["return"][places].float()
        clip = self._config.critic.value_clip
        loss = value_loss(output.values, old_values[places], returns, math.inf if clip is None else clip)
        cp_group = parallel_state.get_context_parallel_group()
        sums = partial(
            sequence_sums, sequence_of_row=batch.sequence_of_row, num_sequences=len(numbers), cp_group=cp_group
        )
        losses = sums(loss) / max(num_tokens, 1)
        values = output.values.detach()
        error = returns - values
        clipped = loss.detach() > 0.5 * error**2
        found.put(
            batch.sequences,
            {
                "loss": losses.detach(),
                "value": sums(values),
                "error": sums(error),
                "squared_error": sums(error**2),
                "clipped": sums(clipped.to(loss.dtype)),
            },
        )
        return losses.sum()


def _request(batch: PackedBatch) -> ValueRequest:
    return ValueRequest(batch.rows)


def _own_optimizer(config: Config) -> Config:
    """The configuration as the critic's optimizer reads it: its own rate, on the policy's course."""
    optimizer, critic = config.optimizer, config.critic
    least = optimizer.min_lr * (critic.lr / optimizer.lr if optimizer.lr else 1.0)
    return replace(
        config,
        optimizer=replace(
            optimizer,
            lr=critic.lr,
            min_lr=min(least, critic.lr),
            weight_decay=critic.weight_decay,
            clip_grad=critic.clip_grad,
        ),
    )


def _returns_of(constants: Constants, members: Sequence[int]) -> Tensor:
    """Of the tokens of these sequences, in fp64."""
    returns, starts = constants.of_tokens["return"].double(), constants.starts.tolist()
    parts = [returns[starts[index] : starts[index] + len(constants.sequences[index].response)] for index in members]
    return torch.cat(parts) if parts else returns[:0]


def critic_metrics(sums: Mapping[str, Tensor], returns: Tensor) -> dict[str, float]:
    """From sums over the tokens of each sequence, fp64 [M] each, and the returns of these tokens, fp64 [T]."""
    count = max(len(returns), 1)
    total = {name: float(values.sum()) for name, values in sums.items()}
    mean = float(returns.sum()) / count
    variance = float((returns - mean).square().sum()) / count
    squared_error = total["squared_error"] / count
    unexplained = squared_error - (total["error"] / count) ** 2
    all_equal = variance == 0 or variance <= _SAME * (mean**2 + squared_error)
    return {
        "value_loss": total["loss"],
        "value_mean": total["value"] / count,
        "return_mean": mean,
        "explained_variance": 0.0 if all_equal else 1 - unexplained / variance,
        "value_clipped_share": total["clipped"] / count,
    }
