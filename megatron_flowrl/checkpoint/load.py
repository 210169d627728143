"""Fill a model's parameters from a weight source, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_flowrl.checkpoint.mapping import Shard, local_tensor
from megatron_flowrl.checkpoint.sources import WeightSource
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.gpt import LanguageModel


def global_parameters(model: LanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This stage's parameters by the name they have in the whole model: layers counted from the first stage's."""
    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in numbers:
            name = f"decoder.layers.{numbers[prefix]}.{name.removeprefix(prefix)}"
        yield name, parameter


@torch.no_grad()
def load_weights(models: Sequence[LanguageModel], architecture: Architecture, source: WeightSource) -> None:
    """Copy each rank's slices into its parameters, in place, cast to their dtype."""
    for model in models:
        for name, parameter in global_parameters(model):
            if is_float8tensor(parameter):
                _fill_quantized(name, parameter, architecture, _shard(model), source)
            else:
                _fill(name, parameter, architecture, _shard(model), source)


@torch.no_grad()
def load_to_host(
    models: Sequence[LanguageModel], architecture: Architecture, source: WeightSource, *, pin_memory: bool
) -> list[Tensor]:
    """What `load_weights` would put into the parameters, as tensors in host memory, in the parameters' order."""
    tensors = []
    for model in models:
        for name, parameter in global_parameters(model):
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=pin_memory)
            _fill(name, tensor, architecture, _shard(model), source)
            tensors.append(tensor)
    return tensors


def _fill_quantized(
    name: str, parameter: Tensor, architecture: Architecture, shard: Shard, source: WeightSource
) -> None:
    """An FP8 weight has no parts to write to: it is quantised whole, and its fp32 main weight starts unquantised.

    Transformer Engine keeps the values before quantisation for the optimizer to begin from.
    """
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    _fill(name, whole, architecture, shard, source)
    parameter.copy_(whole.to(parameter.device))
    unquantized = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if unquantized is not None:
        unquantized.copy_(whole)


def _shard(model: LanguageModel) -> Shard:
    return Shard(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        padded_vocab=model.vocab_size,
    )


def _fill(name: str, target: Tensor, architecture: Architecture, shard: Shard, source: WeightSource) -> None:
    part = local_tensor(name, architecture, shard)
    position = 0
    for piece in part.slices:
        length = piece.stop - piece.start
        target.narrow(part.dim, position, length).copy_(source.read(piece))
        position += length
    target.narrow(part.dim, position, part.padding).zero_()
    if position + part.padding != target.shape[part.dim]:
        raise RuntimeError(
            f"{name}: the mapping gives {position + part.padding} of {target.shape[part.dim]} "
            f"along dimension {part.dim}"
        )
