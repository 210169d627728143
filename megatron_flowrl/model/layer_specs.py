"""The layers a model is built from: Transformer Engine's on GPUs, plain PyTorch ones of the same names elsewhere."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_flowrl.config import PrecisionConfig
from megatron_flowrl.model.fp8_layers import (
    Fp8NormColumnParallelLinear,
    Fp8RowParallelLinear,
    is_bf16_layer,
    with_precision,
)
from megatron_flowrl.model.torch_layers import NormColumnParallelLinear, PackedAttention, RMSNorm, SwiGLU
from megatron_flowrl.platform import Platform


def decoder_spec(
    config: TransformerConfig, precision: PrecisionConfig, platform: Platform, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The specification of this pipeline stage's decoder, for `GPTModel`.

    FP8 is Transformer Engine's own matter, which finds it in `config`; without it, it is that of the layers.
    """
    if platform.is_cuda:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    of_layers = [
        _torch_layer_spec(config, None if is_bf16_layer(precision, layer, config.num_layers) else precision)
        for layer in layers
    ]
    return TransformerBlockSubmodules(layer_specs=of_layers, layer_norm=RMSNorm)


def _torch_layer_spec(config: TransformerConfig, fp8: PrecisionConfig | None) -> ModuleSpec:
    column: type | ModuleSpec = NormColumnParallelLinear
    row: type | ModuleSpec = RowParallelLinear
    if fp8 is not None:
        column, row = with_precision(Fp8NormColumnParallelLinear, fp8), with_precision(Fp8RowParallelLinear, fp8)
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=PackedAttention,
        linear_proj=row,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=SwiGLU)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
