"""What a checkpoint holds of a run, as Megatron's sharded state: every tensor under one name in every layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_flowrl.checkpoint.optimizer_state import optimizer_step, optimizer_tensors, set_optimizer_step
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.model.gpt import LOG_Z_HEAD, OWN_HEADS, VALUE_HEAD

MODEL, LOG_Z, VALUES, OPTIMIZER, SCHEDULE = "model", "log_z", "values", "optimizer", "schedule"
HEADS = {LOG_Z: LOG_Z_HEAD, VALUES: VALUE_HEAD}  # parts that are heads of our own, and their parameters' prefixes

_UNSAFE_PICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


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
            VALUES: self.model.value_head,
            OPTIMIZER: self.optimizer is not None,
            SCHEDULE: self.schedule is not None,
        }
        return [name for name, there in present.items() if there]

    def sharded_state_dict(self, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Megatron's description of this rank's parts, with the tensors themselves; all ranks call it together.

        Saving writes these tensors, and loading fills them where they lie: fused parameters, which reshard in
        pieces, are given as views of the pieces. `without`: prefixes of parameters to leave out.
        """
        described = [module.sharded_state_dict() for module in self.model.modules]
        state: dict[str, Any] = {
            MODEL: {
                f"{MODEL}{index}": {
                    name: _in_pieces(value)
                    for name, value in module.items()
                    if not (without and name.startswith(without))
                }
                for index, module in enumerate(described)
            }
        }
        if self.optimizer is not None:
            tensors = optimizer_tensors(self.optimizer, described, self.model.architecture.vocab_size)
            state[OPTIMIZER] = {"step": optimizer_step(self.optimizer), "tensors": tensors}
        if self.schedule is not None:
            state[SCHEDULE] = self.schedule.state_dict()
        return state

    @torch.no_grad()
    def restore(self, loaded: Mapping[str, Any]) -> None:
        """Take over what was loaded for `sharded_state_dict` and is not in its place yet.

        Learning rate, weight decay, betas and the like stay what the configuration says: only the state comes back.
        """
        for index, module in enumerate(self.model.modules):
            values = loaded[MODEL][f"{MODEL}{index}"]
            whole = {name: value for name, value in values.items() if not isinstance(value, list | dict)}
            with _pickled_scales_allowed():
                missing = module.load_state_dict(whole, strict=False).missing_keys
            unknown = [
                name
                for name in missing
                if name not in values and not name.startswith(OWN_HEADS) and not name.endswith("_extra_state")
            ]
            if unknown:
                raise RuntimeError(f"the checkpoint did not give {', '.join(unknown)}")
            for name, parameter in module.named_parameters():
                # Transformer Engine keeps a quantised weight's values for the optimizer to begin from.
                unquantized = getattr(parameter, "get_high_precision_init_val", lambda: None)()
                if unquantized is not None and name in whole:
                    unquantized.copy_(whole[name])
        if self.optimizer is not None:
            set_optimizer_step(self.optimizer, loaded[OPTIMIZER]["step"])
        if self.schedule is not None:
            self.schedule.load_state_dict(loaded[SCHEDULE])


@contextmanager
def _pickled_scales_allowed() -> Iterator[None]:
    """Let Transformer Engine read the scales of its delayed recipe, unless the environment says not to.

    It writes them as a pickle, which newer versions do not read unless asked. To read a checkpoint is to trust its
    folder in any case: torch unpickles the `.metadata` in it.
    """
    if _UNSAFE_PICKLE in os.environ:
        yield
        return
    os.environ[_UNSAFE_PICKLE] = "1"
    try:
        yield
    finally:
        del os.environ[_UNSAFE_PICKLE]


def _in_pieces(value: Any) -> Any:
    """Views of a fused parameter, such as gate and up; a quantised one has none, and is put together again."""
    if isinstance(value, ShardedTensorFactory) and not is_float8tensor(value.data):
        return value.build()
    return value


def bytes_to_write(sharded: Mapping[str, Any]) -> tuple[int, int]:
    """How many bytes this rank would write, of how many tensors."""
    sizes = [
        value.data.nbytes
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id)
    ]
    return sum(sizes), len(sizes)
