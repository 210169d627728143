"""The frozen reference model: resident beside the policy, or in host memory and exchanged with it for a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from megatron_flowrl.checkpoint.load import load_to_host, load_weights
from megatron_flowrl.checkpoint.sources import WeightSource
from megatron_flowrl.config import Config
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, freeze, weights_in_place
from megatron_flowrl.platform import Platform


class Reference(Protocol):
    """A model that answers forward-only passes while `active`."""

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """The chunks to run the pass on; the policy must not be touched inside."""
        ...


class ResidentReference:
    """Weights of its own on the device: no exchange, twice the memory."""

    def __init__(self, policy: ParallelModel, source: WeightSource, config: Config, platform: Platform) -> None:
        self._model = freeze(build_parallel_model(policy.architecture, config, platform))
        load_weights(self._model, source)

    @contextmanager
    def active(self) -> Iterator[Sequence[torch.nn.Module]]:
        """The reference's own chunks."""
        yield self._model.chunks


class HostReference:
    """Weights in host memory (pinned where there is a GPU), exchanged with the policy's, tensor by tensor.

    The exchange copies bits in both directions, so that the policy comes back as it was; host memory holds one model
    and the device one tensor more.
    """

    def __init__(self, policy: ParallelModel, source: WeightSource, platform: Platform) -> None:
        self._policy = policy
        self._waiting = load_to_host(policy, source, pin_memory=platform.is_cuda)

    @contextmanager
    def active(self) -> Iterator[Sequence[torch.nn.Module]]:
        """The policy's chunks, holding the reference's weights until the block is left."""
        with weights_in_place(self._policy.chunks):
            self._exchange()
            try:
                yield self._policy.chunks
            finally:
                self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        parameters = [parameter for module in self._policy.modules for parameter in module.parameters()]
        for parameter, waiting in zip(parameters, self._waiting, strict=True):
            on_device = parameter.detach().clone()
            parameter.copy_(waiting, non_blocking=True)
            waiting.copy_(on_device, non_blocking=True)
        if parameters and parameters[0].is_cuda:
            torch.cuda.synchronize()


def build_reference(policy: ParallelModel, source: WeightSource, config: Config, platform: Platform) -> Reference:
    """The reference that `reference.placement` asks for."""
    if config.reference.placement == "host":
        return HostReference(policy, source, platform)
    return ResidentReference(policy, source, config, platform)


__all__ = ["HostReference", "Reference", "ResidentReference", "build_reference"]
