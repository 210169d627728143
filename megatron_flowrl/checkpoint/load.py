"""Fill a model's parameters from a weight source: slice by slice, or by Megatron from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_flowrl.checkpoint.mapping import Shard, local_tensor
from megatron_flowrl.checkpoint.reader import load_model
from megatron_flowrl.checkpoint.sources import CheckpointSource, SliceSource, WeightSource
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.build import ParallelModel, weights_in_place
from megatron_flowrl.model.gpt import OWN_HEADS, LanguageModel


def global_parameters(model: LanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This stage's parameters by the name they have in the whole model: layers counted from the first stage's."""
    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in numbers:
            name = f"decoder.layers.{numbers[prefix]}.{name.removeprefix(prefix)}"
        yield name, parameter


def shard_of(model: LanguageModel) -> Shard:
    """Which part of every parameter this rank holds."""
    return Shard(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        padded_vocab=model.vocab_size,
    )


@torch.no_grad()
def load_weights(model: ParallelModel, source: WeightSource, on_parameter: Callable[[], object] = lambda: None) -> None:
    """Fill this rank's parameters, in place, cast to their dtype. All ranks call it together.

    `on_parameter` is called after each parameter, but for a checkpoint, which is loaded as a whole.
    This project's own heads keep their values, unless the source is a checkpoint that has them.
    """
    if isinstance(source, CheckpointSource):
        load_model(model, source.path, checksums=source.checksums)
        return
    for module in model.modules:
        shard = shard_of(module)
        for name, parameter in global_parameters(module):
            if name.startswith(OWN_HEADS):
                continue
            if is_float8tensor(parameter):
                _fill_quantized(name, parameter, model.architecture, shard, source)
            else:
                _fill(name, parameter, model.architecture, shard, source)
            on_parameter()


@torch.no_grad()
def load_to_host(model: ParallelModel, source: WeightSource, *, pin_memory: bool) -> list[Tensor]:
    """What `load_weights` would put into the parameters, as tensors in host memory, in the parameters' order.

    The model keeps its weights. All ranks call it together.
    """
    parameters = [(module, *named) for module in model.modules for named in global_parameters(module)]
    tensors = [torch.empty(p.shape, dtype=p.dtype, device="cpu", pin_memory=pin_memory) for _, _, p in parameters]
    if isinstance(source, CheckpointSource):
        with weights_in_place(model.chunks):
            for (_, _, parameter), tensor in zip(parameters, tensors, strict=True):
                tensor.copy_(parameter)
            load_model(model, source.path, checksums=source.checksums)
            for (_, _, parameter), tensor in zip(parameters, tensors, strict=True):
                loaded = parameter.detach().clone()
                parameter.copy_(tensor)
                tensor.copy_(loaded)
        return tensors
    for (module, name, parameter), tensor in zip(parameters, tensors, strict=True):
        if name.startswith(OWN_HEADS):
            tensor.copy_(parameter)
        else:
            _fill(name, tensor, model.architecture, shard_of(module), source)
    return tensors


def _fill_quantized(
    name: str, parameter: Tensor, architecture: Architecture, shard: Shard, source: SliceSource
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


def _fill(name: str, target: Tensor, architecture: Architecture, shard: Shard, source: SliceSource) -> None:
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
