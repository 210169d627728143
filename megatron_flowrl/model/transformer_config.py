"""From our configuration to Megatron's: every setting that reaches the library passes through here."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_flowrl.config import Config
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.platform import Platform

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def transformer_config(architecture: Architecture, config: Config, platform: Platform) -> TransformerConfig:
    """Megatron's configuration of a policy or reference.

    `calculate_per_token_loss` makes Megatron leave losses and gradients as plain sums over micro-batches and
    data-parallel ranks: the loss divides by the mini-batch's global number of sequences itself.
    """
    dtype = DTYPES[config.precision.dtype]
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        perform_initialization=False,
        **_parallel(config, dtype),
        **(_fp8(config) if platform.is_cuda else {}),  # elsewhere FP8 is in our layers, of which Megatron knows nothing
        **_recompute(config),
        **_platform(config, platform),
    )


def _parallel(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "pipeline_dtype": dtype,
        # Packed micro-batches differ in length: stages tell each other the shape of what they send.
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        "moe_token_dispatcher_type": "alltoall",  # the one Megatron allows beside that, even where there is no MoE
        "deallocate_pipeline_outputs": parallel.pipeline_model_parallel_size > 1,
        # Megatron's rule: with chunks interleaved, two stages would otherwise exchange several tensors in one batch.
        "overlap_p2p_comm": parallel.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": parallel.virtual_pipeline_model_parallel_size is None,
    }


def _fp8(config: Config) -> dict[str, Any]:
    precision = config.precision
    if precision.fp8 is None:
        return {}
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _recompute(config: Config) -> dict[str, Any]:
    recompute = config.recompute
    if recompute.recompute_granularity is None:
        return {}
    settings: dict[str, Any] = {"recompute_granularity": recompute.recompute_granularity}
    if recompute.recompute_granularity == "full":
        settings["recompute_method"] = recompute.recompute_method
        settings["recompute_num_layers"] = recompute.recompute_num_layers
    else:
        settings["recompute_modules"] = list(recompute.recompute_modules)
    return settings


def _platform(config: Config, platform: Platform) -> dict[str, Any]:
    fused = platform.is_cuda
    settings: dict[str, Any] = {
        "use_cpu_initialization": not fused,
        "gradient_accumulation_fusion": platform.gradient_accumulation_fusion is not None,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,  # the mask is in the packed attention
        "persist_layer_norm": fused,
        "apply_rope_fusion": fused,
        "use_te_activation_func": not fused,  # our SwiGLU, where the layer spec names it
    }
    if config.parallel.context_parallel_size > 1:
        settings["cp_comm_type"] = "p2p"
    return settings
