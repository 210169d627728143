"""The learned partition function: log Z of a prompt, from the hidden states of its tokens.

FlowRL (arXiv 2509.15207), section 3: a three-layer MLP on the mean over the prompt's tokens of the last layer's hidden
state. It is part of the last pipeline stage, whole on every tensor-parallel rank, and in fp32 whatever the model's
dtype: its output is compared with sums over thousands of tokens.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn


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
                nn.Dropout(dropout),
            ]
        layers.append(nn.Linear(hidden_size, 1, device=device, dtype=torch.float32))
        self.layers = nn.Sequential(*layers)

    def forward(self, prompt_hidden: Tensor) -> Tensor:
        """prompt_hidden [prompts, hidden], any float dtype; log Z fp32 [prompts]."""
        log_z: Tensor = self.layers(prompt_hidden.float())
        return log_z.squeeze(-1)

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
