"""A model ready for Megatron's schedules: this rank's chunks, bare for forward-only work, in DDP for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.gpt import LanguageModel, build_language_model
from megatron_flowrl.model.layout import padded_vocab_size
from megatron_flowrl.model.transformer_config import transformer_config
from megatron_flowrl.platform import Platform


@dataclass(frozen=True)
class ParallelModel:
    """One model, cut as the configuration says.

    `modules` are this rank's chunks, bare; `chunks` are what the schedules run: the same, or each in Megatron's DDP.
    `log_z` says that the last stage, wherever it is, has a partition function; `value_head` that it is a critic's.
    """

    architecture: Architecture
    transformer_config: TransformerConfig
    modules: list[LanguageModel]
    chunks: list[Any]
    log_z: bool = False
    value_head: bool = False


def build_parallel_model(
    architecture: Architecture,
    config: Config,
    platform: Platform,
    *,
    log_z: bool = False,
    value_head: bool = False,
) -> ParallelModel:
    """Allocate this rank's chunks; weights come with `load_weights`, training with `wrap_for_training`.

    With `log_z` the last stage has a partition function too, which starts from `config.seed`; with `value_head` it has
    that in the place of the output layer.

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
        module = build_language_model(
            architecture,
            settings,
            config.precision,
            platform,
            padded_vocab=vocab,
            vp_stage=stage,
            log_z_dropout=config.log_z.dropout if log_z else None,
            value_head=value_head,
        )
        if log_z and module.post_process:
            module.log_z.initialize(config.seed)
        modules.append(module.to(platform.device))
    return ParallelModel(architecture, settings, modules, list(modules), log_z, value_head)


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
                check_for_nan_in_grad=False,  # Megatron would end the run; our optimizer leaves the step out
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
    return replace(model, chunks=chunks)


@contextmanager
def weights_in_place(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Have all weights in place while the block runs, for whoever reads them outside a forward pass.

    Under `overlap_param_gather` the gathering of updated weights is left to hooks of the next forward pass: before
    it, parameters hold stale parts, and inside the block those hooks would run in the midst of things. Blocks may be
    nested.
    """
    lazy = [c for c in chunks if isinstance(c, DistributedDataParallel) and c.remove_forward_pre_hook_handles]
    for chunk in lazy:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in lazy:
            chunk.enable_forward_pre_hook()


def finalize_gradients(chunks: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's reductions after the last micro-batch, without its division by the number of tokens."""
    finalize_model_grads(chunks, None, **kwargs)
