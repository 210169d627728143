"""What the last stage finds of a mini-batch's sequences, brought to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.platform.distributed import to_all_pipeline_stages


class Collected:
    """Values of the mini-batch's sequences: put in on the last stage, micro-batch by micro-batch; then everywhere."""

    def __init__(self, names: Sequence[str], members: Sequence[int], device: torch.device) -> None:
        self._names = names
        self._place = {index: place for place, index in enumerate(members)}
        self._values = torch.zeros((len(names), len(members)), dtype=torch.float32, device=device)

    def put(self, sequences: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """values [len(sequences)] each, under exactly the names. Raises RuntimeError for other names."""
        if values.keys() != set(self._names):
            raise RuntimeError(f"statistics {sorted(values)} were answered where {sorted(self._names)} are announced")
        places = [self._place[index] for index in sequences]
        self._values[:, places] = torch.stack([values[name].float() for name in self._names])

    def everywhere(self) -> dict[str, Tensor]:
        """fp32 [members] each: one sum over data-parallel ranks, of which each sequence has one; one broadcast."""
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            dist.all_reduce(self._values, group=parallel_state.get_data_parallel_group())
        to_all_pipeline_stages(self._values)
        return dict(zip(self._names, self._values, strict=True))


def members_of(packing: PackingPlan, mini_batch: int) -> tuple[int, ...]:
    """The sequences of a mini-batch, wherever they are computed, in their order in the rollout."""
    return tuple(
        sorted(index for rank in packing.mini_batches[mini_batch] for micro in rank for index in micro.sequences)
    )


def agreed(fact: bool, device: torch.device) -> bool:
    """Whether it holds on all ranks."""
    flag = torch.tensor(float(fact), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
