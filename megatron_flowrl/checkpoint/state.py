"""What a checkpoint holds of a run, as Megatron's sharded state: every tensor under one name in every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_flowrl.checkpoint.optimizer_state import optimizer_step, optimizer_tensors, set_optimizer_step
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.model.gpt import OWN_HEADS

MODEL, LOG_Z, OPTIMIZER, SCHEDULE = "model", "log_z", "optimizer", "schedule"


@dataclass(frozen=True)
class TrainingState:
    """Everything that a step changes. Without optimizer and schedule it is a model's weights."""

    model: ParallelModel
    optimizer: MegatronOptimizer | None = None
    schedule: OptimizerParamScheduler | None = None

    @property
    def parts(self) -> list[str]:
        """What a checkpoint of this state holds."""
        present = {
            MODEL: True,
            LOG_Z: self.model.log_z,
            OPTIMIZER: self.optimizer is not None,
            SCHEDULE: self.schedule is not None,
        }
        return [name for name, there in present.items() if there]

    def sharded_state_dict(self, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Megatron's description of this rank's parts, with the tensors themselves; all ranks call it together.

        `without`: prefixes of parameters to leave out.
        """
        models = {
            f"{MODEL}{index}": {
                name: value
                for name, value in module.sharded_state_dict().items()
                if not (without and name.startswith(without))
            }
            for index, module in enumerate(self.model.modules)
        }
        state: dict[str, Any] = {MODEL: models}
        if self.optimizer is not None:
            tensors = optimizer_tensors(self.optimizer, models, self.model.architecture.vocab_size)
            state[OPTIMIZER] = {"step": optimizer_step(self.optimizer), "tensors": tensors}
        if self.schedule is not None:
            state[SCHEDULE] = self.schedule.state_dict()
        return state

    @torch.no_grad()
    def restore(self, loaded: Mapping[str, Any]) -> None:
        """Take over what was loaded for `sharded_state_dict`; the optimizer's tensors were loaded where they lie.

        Learning rate, weight decay, betas and the like stay what the configuration says: only the state comes back.
        """
        for index, module in enumerate(self.model.modules):
            missing = module.load_state_dict(loaded[MODEL][f"{MODEL}{index}"], strict=False).missing_keys
            if any(not name.startswith(OWN_HEADS) and not name.endswith("_extra_state") for name in missing):
                raise RuntimeError(f"the checkpoint did not give {', '.join(missing)}")
        if self.optimizer is not None:
            set_optimizer_step(self.optimizer, loaded[OPTIMIZER]["step"])
        if self.schedule is not None:
            self.schedule.load_state_dict(loaded[SCHEDULE])


def bytes_to_write(sharded: Mapping[str, Any]) -> int:
    """How much of it this rank would write."""
    return sum(
        value.data.nbytes
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id)
    )
