"""A model ready for Megatron's schedules: this rank's chunks, bare for forward-only work, in DDP for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.gpt import LanguageModel, build_language_model, padded_vocab_size
from megatron_flowrl.model.transformer_config import transformer_config
from megatron_flowrl.platform import Platform


@dataclass(frozen=True)
class ParallelModel:
    """One model, cut as the configuration says.

    `modules` are this rank's chunks, bare; `chunks` are what the schedules run: the same, or each in Megatron's DDP.
    """

    architecture: Architecture
    transformer_config: TransformerConfig
    modules: list[LanguageModel]
    chunks: list[Any]


def build_parallel_model(architecture: Architecture, config: Config, platform: Platform) -> ParallelModel:
    """Allocate this rank's chunks; weights come with `load_weights`, training with `wrap_for_training`.

    Parameters keep the dtype they are made with: Megatron's Float16Module is not used, as it would also turn the
    fp32 heads of this project into bf16.
    """
    settings = transformer_config(architecture, config, platform)
    parallel = config.parallel
    vocab = padded_vocab_size(
        architecture.vocab_size, config.model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
    stages: list[int | None] = [None]
    if parallel.virtual_pipeline_model_parallel_size is not None:
        stages = list(range(parallel.virtual_pipeline_model_parallel_size))
    modules = []
    for stage in stages:
        module = build_language_model(architecture, settings, platform, padded_vocab=vocab, vp_stage=stage)
        modules.append(module.to(platform.device))
    return ParallelModel(architecture, settings, modules, list(modules))


def freeze(model: ParallelModel) -> ParallelModel:
    """Make the model forward-only, such as a reference: no gradients, evaluation mode."""
    for module in model.modules:
        module.requires_grad_(False)
        module.eval()
        for parameter in module.parameters():  # Transformer Engine keeps FP8 weights unquantised for an optimizer
            getattr(parameter, "clear_high_precision_init_val", lambda: None)()
    return model


def wrap_for_training(model: ParallelModel, config: Config) -> ParallelModel:
    """Wrap the loaded chunks in Megatron's DDP and connect the schedules to it. Gradients are reduced in fp32."""
    ddp, settings = config.ddp, model.transformer_config
    chunks = [
        DistributedDataParallel(
            settings,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                check_for_nan_in_grad=True,  # Megatron would step on: no number compares with a NaN norm
                overlap_grad_reduce=ddp.overlap_grad_reduce,
                overlap_param_gather=ddp.overlap_param_gather,
                use_distributed_optimizer=ddp.use_distributed_optimizer,
                bucket_size=ddp.bucket_size,
                fp8_param_gather=config.precision.fp8_param_gather,
            ),
            module,
            # Only the first chunk's communication has to hide behind computation in buckets.
            disable_bucketing=index > 0,
        )
        for index, module in enumerate(model.modules)
    ]
    settings.finalize_model_grads_func = finalize_gradients
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        settings.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return ParallelModel(model.architecture, settings, model.modules, chunks)


def finalize_gradients(chunks: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's reductions after the last micro-batch, without its division by the number of tokens."""
    finalize_model_grads(chunks, None, **kwargs)
