"""The policy and all that trains it: what becomes of a step's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import WeightSource
from megatron_flowrl.checkpoint.state import TrainingState
from megatron_flowrl.config import Config
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, wrap_for_training
from megatron_flowrl.model.objective import needs_old_pass
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.objectives.batch import Objective
from megatron_flowrl.objectives.mismatch import mismatch
from megatron_flowrl.objectives.statistics import summarize
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform import Platform
from megatron_flowrl.training.critic import Critic
from megatron_flowrl.training.experience import Experience, with_old_pass, with_reference_pass
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import Listener
from megatron_flowrl.training.ranks import RankWait, Stragglers
from megatron_flowrl.training.reference import Reference, build_reference
from megatron_flowrl.training.schedule import build_schedule
from megatron_flowrl.training.update import Updater, UpdateResult

Timed = Callable[[str], AbstractContextManager[object]]  # the name of a phase -> what measures it
_LIKE_THE_FIRST = ("weight_mean", "weight_max", "ratio", "kl_old", "kl_reference")


@dataclass(frozen=True)
class TrainedStep:
    """What a step did: numbers by room/name, and the values they are made of, [sequences] each, in no order."""

    metrics: Mapping[str, float]
    values: Mapping[str, Tensor]
    packing: PackingPlan | None  # None: there was nothing to train on


class Trainer:
    """All ranks construct it together. The reference's and the critic's weights begin as the policy's."""

    def __init__(
        self,
        architecture: Architecture,
        source: WeightSource,
        objective: Objective,
        config: Config,
        platform: Platform,
        data_parallel_size: int,
    ) -> None:
        needs = objective.needs
        delayed = config.precision.fp8 is not None and config.precision.fp8_recipe == "delayed"
        if delayed and dist.get_rank() == 0:
            logger.warning(
                "precision.fp8_recipe = delayed: a pass takes its scales from those before it, so that the same "
                "weights give other log-probs each time: on-policy importance weights of up to 3 were seen, in the "
                "first step up to the clip; with tensorwise and blockwise they are 1"
            )
        self._config, self._objective, self._platform, self._device = config, objective, platform, platform.device
        model = build_parallel_model(architecture, config, platform, log_z=needs.log_z)
        load_weights(model, source)
        self.model: ParallelModel = wrap_for_training(model, config)
        self._optimizer = Optimizer(self.model, config)
        self._schedule = build_schedule(self._optimizer.megatron, config.optimizer)
        self.state = TrainingState(self.model, self._optimizer.megatron, self._schedule)
        self.updater = Updater(self.model, self._optimizer, objective, config, platform.device)
        self._reference: Reference | None = None
        if needs.reference:
            self._reference = build_reference(self.model, source, config, platform)
        self.critic = Critic(architecture, source, config, platform) if needs.values else None
        self._stragglers = Stragglers(platform)
        self._rules = packing_rules(config, architecture, data_parallel_size)

    def step(
        self,
        number: int,
        experience: Experience,
        mini_batch_of: Sequence[int],
        timed: Timed = nullcontext,
        on_update: Callable[[], object] = lambda: None,
        on_progress: Callable[[bool], object] = lambda _: None,
    ) -> TrainedStep:
        """The passes before the updates, then an update for each mini-batch; all at the learning rate of the step.

        speed/rank_wait_seconds is what a rank, on average, stood waiting for others at the ends of these; it is a part
        of their time. `ranks` has more of that.

        `mini_batch_of` says which mini-batch each of the experience's sequences is in. `number` counts from 1.
        """
        self._schedule.step(1)
        if self.critic is not None:
            self.critic.schedule.step(1)
        metrics = {"update/lr": self._learning_rate()}
        if not experience.sequences:
            return TrainedStep(metrics | {"update/updates": 0.0}, {}, None)
        packing = plan([len(sequence) for sequence in experience.sequences], self._rules, mini_batch_of)
        wait = RankWait(self._platform, on_progress)
        experience = self._with_passes(experience, packing, timed, wait)
        results, of_critic = [], []
        constants = self.updater.prepare(experience, packing, step=number)
        for mini_batch in range(len(packing.mini_batches)):
            with timed("update"):
                results.append(self.updater.update(constants, mini_batch, wait))
            if self.critic is not None:
                with timed("critic"):
                    of_critic.append(self.critic.update(experience, constants, mini_batch, wait))
            on_update()
        values = _joined(results)
        metrics |= _of_updates(results, values) | _means("critic", of_critic)
        if experience.old is not None and experience.sampler_log_probs is not None:
            found = mismatch(experience.old.log_probs.cpu(), experience.sampler_log_probs, experience.offsets.tolist())
            metrics |= {f"mismatch/{name}": value for name, value in found.as_metrics().items()}
        metrics |= {"plan/real_token_share": packing.efficiency, "plan/imbalance": packing.imbalance}
        metrics |= self._stragglers.measure(wait)
        return TrainedStep(metrics, values, packing)

    def _with_passes(self, experience: Experience, packing: PackingPlan, timed: Timed, wait: Listener) -> Experience:
        config, needs = self._config, self._objective.needs
        if needs_old_pass(needs, len(packing.mini_batches), config):
            with timed("old_log_probs"):
                experience = with_old_pass(experience, self.model.chunks, packing, config, self._device, needs, wait)
        if self._reference is not None:
            with timed("reference_log_probs"), self._reference.active() as chunks:
                experience = with_reference_pass(experience, chunks, packing, config, self._device, wait)
        if self.critic is not None:
            with timed("values"):
                experience = self.critic.with_values(experience, packing, wait)
        return experience

    def _learning_rate(self) -> float:
        """That of the policy's weights; the partition function has a group of its own."""
        groups = [group for group in self._optimizer.megatron.param_groups if "part" not in group]
        return float(groups[0]["lr"])


def mini_batches(groups: Sequence[int], prompts_per_mini_batch: int) -> list[int]:
    """Which mini-batch each answer is in: prompts in their order, all answers to one together, shared out evenly."""
    order = list(dict.fromkeys(groups))
    count = -(-len(order) // prompts_per_mini_batch)
    place = {group: index * count // len(order) for index, group in enumerate(order)}
    return [place[group] for group in groups]


def _joined(results: Sequence[UpdateResult]) -> dict[str, Tensor]:
    return {name: torch.cat([result.statistics[name] for result in results]).cpu() for name in results[0].statistics}


def _of_updates(results: Sequence[UpdateResult], values: Mapping[str, Tensor]) -> dict[str, float]:
    """Over all sequences of the step; and of the first mini-batch alone what has to be 1 or 0 there."""
    losses = [result.metrics["loss"] for result in results]
    metrics = {"loss": sum(losses) / len(losses), **summarize(values)}
    for name in (name for name in results[0].metrics if name.startswith("grad_norm")):
        norms = [result.metrics[name] for result in results]
        metrics |= {name: sum(norms) / len(norms), f"{name}_max": max(norms)}
    metrics["updates"] = float(sum(result.updated for result in results))
    metrics["skipped_updates"] = len(results) - metrics["updates"]
    first = {f"first_{name}": results[0].metrics[name] for name in _LIKE_THE_FIRST if name in results[0].metrics}
    return {f"update/{name}": value for name, value in (metrics | first).items()}


def _means(room: str, metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if not metrics:
        return {}
    sums = {name: sum(one[name] for one in metrics) for name in metrics[0]}
    counts = {"skipped_updates"}  # over the step, as the policy's are
    return {f"{room}/{name}": value if name in counts else value / len(metrics) for name, value in sums.items()}


__all__ = ["TrainedStep", "Trainer", "mini_batches"]
