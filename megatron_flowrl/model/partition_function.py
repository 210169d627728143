"""The learned partition function: log Z of a prompt, from the hidden states of its tokens.

FlowRL (arXiv 2509.15207), section 3: a three-layer MLP on the mean over the prompt's tokens of the last layer's hidden
state. It is part of the last pipeline stage, whole on every tensor- and context-parallel rank, and in fp32 whatever the
model's dtype: its output is compared with sums over thousands of tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor, nn


@dataclass(frozen=True)
class LogZRequest:
    """The prompts whose log Z is asked for.

    rows int64 [P]: positions of prompt tokens among this context-parallel rank's (counted over all tensor-parallel
    ranks); sequence_of_row int64 [P], in [0, S); counts [S]: tokens that each mean is over, on all ranks;
    seeds: one for each prompt, for dropout; None: no dropout. `detach` keeps the gradient from the hidden states.
    """

    rows: Tensor
    sequence_of_row: Tensor
    counts: Tensor
    detach: bool = False
    seeds: Sequence[int] | None = None


class PartitionFunction(nn.Module):
    """[Linear(h, h), GELU, LayerNorm, Dropout] twice, then Linear(h, 1): 2 h^2 + 7 h + 1 parameters."""

    def __init__(self, hidden_size: int, *, dropout: float = 0.0, device: torch.device | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [
                nn.Linear(hidden_size, hidden_size, device=device, dtype=torch.float32),
                nn.GELU(),
                nn.LayerNorm(hidden_size, device=device, dtype=torch.float32),
                _SeededDropout(dropout),
            ]
        layers.append(nn.Linear(hidden_size, 1, device=device, dtype=torch.float32))
        self.layers = nn.Sequential(*layers)

    def forward(self, prompt_hidden: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """prompt_hidden [prompts, hidden], any float dtype; log Z fp32 [prompts].

        With `seeds`, one for each prompt, dropout is applied: what is dropped depends on nothing but the seed.
        """
        values = prompt_hidden.float()
        for number, layer in enumerate(self.layers):
            values = layer(values, seeds, number) if isinstance(layer, _SeededDropout) else layer(values)
        return values.squeeze(-1)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """torch's own initial distribution, each parameter from a generator of its own: the same on every rank."""
        for name, parameter in self.named_parameters():
            index = int(name.split(".")[1])
            layer = self.layers[index]
            if isinstance(layer, nn.LayerNorm):
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            digest = hashlib.sha256(f"{seed}/log_z.{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            bound = 1 / math.sqrt(layer.in_features)  # type: ignore[arg-type]
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


class _SeededDropout(nn.Module):
    """Dropout whose mask is the same on all ranks that hold a copy of the head, and in every cut of a batch."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor, seeds: Sequence[int] | None, layer: int) -> Tensor:
        if seeds is None or self.share == 0 or not self.training:
            return values
        rows = [
            torch.rand(values.shape[1], generator=torch.Generator().manual_seed(seed ^ layer)) >= self.share
            for seed in seeds
        ]
        kept = torch.stack(rows) if rows else torch.zeros(values.shape, dtype=torch.bool)
        return values * kept.to(values.device) / (1 - self.share)


def prompt_log_z(
    head: PartitionFunction,
    hidden: Tensor,
    request: LogZRequest,
    *,
    tp_group: dist.ProcessGroup,
    cp_group: dist.ProcessGroup,
    sequence_parallel: bool,
) -> Tensor:
    """log Z of each prompt, fp32 [S], the same on every tensor- and context-parallel rank.

    hidden [tokens (/ TP under sequence parallelism), hidden size]: this rank's.

    Every rank computes the same loss from these, and has the gradient of its own tokens' hidden states in whole. The
    head's parameters are copies whose gradients Megatron adds up over the context-parallel ranks, so that each rank
    gives its share of them; over the tensor-parallel ranks nothing is added.
    """
    rows, sequences = request.rows, request.sequence_of_row
    if sequence_parallel:
        first = tp_group.rank() * hidden.shape[0]
        here = (rows >= first) & (rows < first + hidden.shape[0])
        rows, sequences = rows[here] - first, sequences[here]
    if request.detach:
        hidden = hidden.detach()
    sums = hidden.new_zeros((len(request.counts), hidden.shape[1]), dtype=torch.float32)
    sums = sums.index_add(0, sequences, hidden[rows].float())
    for group, cut in ((tp_group, sequence_parallel), (cp_group, True)):
        if cut and group.size() > 1:
            sums = tensor_parallel.reduce_from_tensor_model_parallel_region(sums, group=group)
    means = sums / request.counts.unsqueeze(1).to(sums.dtype)
    copies = cp_group.size()
    log_z: Tensor = _scale_gradient(head(_scale_gradient(means, copies), request.seeds), 1 / copies)
    return log_z


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _scale_gradient(values: Tensor, factor: float) -> Tensor:
    scaled: Tensor = values if factor == 1 else _ScaledGradient.apply(values, factor)
    return scaled
