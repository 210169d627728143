"""An optimizer step: a mini-batch, one call of Megatron's schedule, reductions, the objective, the optimizer.

This is the only place where a policy is updated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_flowrl.config import Config
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.model.gpt import TokenLogProbs
from megatron_flowrl.model.partition_function import LogZRequest
from megatron_flowrl.objectives.batch import Batch, Objective
from megatron_flowrl.objectives.statistics import summarize
from megatron_flowrl.observe.log import logger
from megatron_flowrl.training.collect import Collected, agreed, members_of
from megatron_flowrl.training.experience import Experience
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import Listener, forward_backward, local_batches
from megatron_flowrl.training.reductions import sequence_sums


@dataclass(frozen=True)
class Constants:
    """What stays the same during the updates of a step, on the device: [T] for tokens, [M] for sequences."""

    sequences: Sequence[TokenSequence]
    packing: PackingPlan
    starts: Tensor  # int64 [M]
    old: Tensor | None
    reference: Tensor | None
    sampler_weight: Tensor | None
    of_sequences: Mapping[str, Tensor]
    of_tokens: Mapping[str, Tensor]
    step: int


@dataclass(frozen=True)
class UpdateResult:
    """What an update did. `statistics`: values of the mini-batch's sequences, in the order of `sequences`."""

    updated: bool
    metrics: Mapping[str, float]
    sequences: tuple[int, ...]
    statistics: Mapping[str, Tensor]


class Updater:
    """A policy, its optimizer and its objective; `skipped_steps` counts what was not finite."""

    def __init__(
        self, model: ParallelModel, optimizer: Optimizer, objective: Objective, config: Config, device: torch.device
    ) -> None:
        self._model, self._optimizer, self._objective = model, optimizer, objective
        self._config, self._device = config, device
        self.skipped_steps = 0

    def prepare(self, experience: Experience, packing: PackingPlan, *, step: int) -> Constants:
        """Advantages and the like, once for all updates of the step; `step` is what dropout is drawn from."""
        rollout = experience.rollout(self._device)
        prepared = self._objective.prepare(rollout)
        weights = experience.sampler_weights(self._config)
        return Constants(
            experience.sequences,
            packing,
            rollout.offsets[:-1],
            rollout.old_log_probs,
            rollout.reference_log_probs,
            None if weights is None else weights.to(self._device),
            prepared.sequences,
            prepared.tokens,
            step,
        )

    def update(self, constants: Constants, mini_batch: int, listener: Listener | None = None) -> UpdateResult:
        """One optimizer step. All ranks call it together, and get the same result.

        Where a loss or a gradient is not finite nothing is updated, which is counted and said.
        """
        batches = local_batches(constants.sequences, constants.packing, mini_batch, self._device)
        members = members_of(constants.packing, mini_batch)
        found = Collected(("loss", *self._objective.statistics), members, self._device)
        needs = self._objective.needs
        entropy = needs.entropy
        if entropy == "none" and self._config.log_prob.entropy:
            entropy = "detached"
        self._optimizer.zero_grad()
        forward_backward(
            self._model.chunks,
            batches,
            self._config.log_prob,
            partial(self._loss, constants, members, found),
            entropy=entropy,
            log_z=partial(self._log_z_request, constants) if needs.log_z else None,
            listener=listener,
        )
        values = found.everywhere()
        losses = values.pop("loss")
        finite = agreed(bool(losses.isfinite().all()), self._device)
        result = self._optimizer.step(skip=not finite)
        if not result.updated:
            self.skipped_steps += 1
            what = "a loss" if not finite else f"the gradient's norm ({result.grad_norm})"
            logger.warning("step %d, mini-batch %d: %s is not finite; not updated", constants.step, mini_batch, what)
        metrics = {
            "loss": float(losses.double().sum()),
            **summarize(values),
            "grad_norm": result.grad_norm,
            **{f"grad_norm_{part}": norm for part, norm in result.grad_norms.items()},
            "skipped_steps": float(self.skipped_steps),
        }
        return UpdateResult(result.updated, metrics, members, values)

    def _loss(
        self, constants: Constants, members: Sequence[int], found: Collected, output: TokenLogProbs, batch: PackedBatch
    ) -> Tensor:
        numbers = torch.tensor(batch.sequences, dtype=torch.int64, device=self._device)
        places = constants.starts[numbers][batch.sequence_of_row] + batch.response_index
        cp_group = parallel_state.get_context_parallel_group()
        dtype = output.log_probs.dtype

        def of_tokens(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[places].to(dtype)

        old = of_tokens(constants.old)
        losses, statistics = self._objective(
            Batch(
                log_probs=output.log_probs,
                old_log_probs=output.log_probs.detach() if old is None else old,
                reference_log_probs=of_tokens(constants.reference),
                entropy=output.entropy,
                log_z=output.log_z,
                sampler_weight=of_tokens(constants.sampler_weight),
                sum_tokens=lambda values: sequence_sums(values, batch.sequence_of_row, batch.num_sequences, cp_group),
                sequence_of=batch.sequence_of_row,
                lengths=batch.response_lengths.to(dtype),
                num_sequences=len(members),
                num_tokens=sum(len(constants.sequences[index].response) for index in members),
                sequences={name: values[numbers] for name, values in constants.of_sequences.items()},
                tokens={name: values[places] for name, values in constants.of_tokens.items()},
            )
        )
        found.put(batch.sequences, {"loss": losses.detach(), **statistics})
        return losses.sum()

    def _log_z_request(self, constants: Constants, batch: PackedBatch) -> LogZRequest:
        settings = self._config.log_z
        rows, sequence, counts = batch.prompt_rows, batch.sequence_of_prompt_row, batch.prompt_lengths
        if settings.prompt_tokens == "drop_last":
            positions = batch.position_ids[0, rows]
            kept = (positions < counts[sequence] - 1) | (counts[sequence] == 1)
            rows, sequence, counts = rows[kept], sequence[kept], (counts - 1).clamp(min=1)
        seeds = None
        if settings.dropout > 0:
            seeds = [_seed(self._config.seed, constants.step, index) for index in batch.sequences]
        return LogZRequest(rows, sequence, counts, settings.detach, seeds)


def _seed(*place: int) -> int:
    digest = hashlib.sha256(repr(place).encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**62


__all__ = ["Constants", "UpdateResult", "Updater"]
