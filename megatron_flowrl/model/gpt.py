"""The language model: Megatron's `GPTModel`, whose last stage answers with log-probs instead of logits.

`GPTModel` is built in this file only: its successor in Megatron-Core (`HybridModel`) will be a change of one file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_flowrl.config import PrecisionConfig
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.layer_specs import decoder_spec
from megatron_flowrl.model.partition_function import LogZRequest, PartitionFunction, prompt_log_z
from megatron_flowrl.model.value_head import TokenValues, ValueHead, ValueRequest
from megatron_flowrl.ops.linear_log_prob import linear_log_prob
from megatron_flowrl.platform import Platform

# Prefixes of what a model holds beside the language model: never in a Hugging Face folder, nor in the sampler.
LOG_Z_HEAD, VALUE_HEAD = "log_z.", "output_layer.value."
OWN_HEADS = (LOG_Z_HEAD, VALUE_HEAD)

EntropyMode = Literal["none", "detached", "differentiable"]


@dataclass(frozen=True)
class LogProbRequest:
    """What the last stage is asked for: the log-probs of `labels` after the tokens at `rows`.

    rows int64 [N]: positions among this context-parallel rank's tokens whose hidden states predict the labels
    (counted over all tensor-parallel ranks); labels int64 [N], in [0, vocab_size).
    """

    rows: Tensor
    labels: Tensor
    temperature: float
    chunk_bytes: int | None
    entropy: EntropyMode = "none"
    log_z: LogZRequest | None = None


@dataclass(frozen=True)
class TokenLogProbs:
    """The last stage's answer, in the order of the request, equal on all tensor-parallel ranks.

    log_probs, entropy fp32 [N]; log_z fp32 [S], equal on all context-parallel ranks too.
    """

    log_probs: Tensor
    entropy: Tensor | None
    log_z: Tensor | None = None


class LogProbOutputLayer(tensor_parallel.ColumnParallelLinear):
    """The vocabulary-parallel output layer, which also goes straight to log-probs.

    The request is answered inside `forward`, so that the hooks Megatron hangs on this module (the wait for a gathered
    weight under `overlap_param_gather`, above all) have run when the weight is read.
    """

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        request: LogProbRequest | None = None,
    ) -> Any:
        """Logits as in Megatron, or a TokenLogProbs for a request; input_ [tokens (/ TP), 1, hidden]."""
        if request is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
            hidden = hidden.squeeze(1).index_select(0, request.rows)
        else:
            hidden = input_.squeeze(1).index_select(0, request.rows)
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        log_probs, entropy = linear_log_prob(
            hidden,
            weight,
            request.labels,
            temperature=request.temperature,
            vocab_start=self.tp_group.rank() * self.output_size_per_partition,
            vocab_size=self.true_vocab_size,
            tp_group=self.tp_group,
            chunk_bytes=request.chunk_bytes,
            entropy=request.entropy,
            accumulate_into_main_grad=getattr(weight, "main_grad", None) is not None,
        )
        return TokenLogProbs(log_probs, entropy)


class LanguageModel(GPTModel):
    """A GPT whose `labels` argument takes a LogProbRequest (and still a label tensor, or nothing for logits).

    With `log_z_dropout` its last stage also has the partition function, as `log_z`. With `value_head` it is a critic,
    which takes a ValueRequest, and has no vocabulary to answer from.
    """

    def __init__(
        self,
        *args: Any,
        true_vocab_size: int,
        log_z_dropout: float | None = None,
        value_head: bool = False,
        **kwargs: Any,
    ) -> None:
        self._true_vocab_size, self._has_value_head = true_vocab_size, value_head
        super().__init__(*args, **kwargs)
        if log_z_dropout is not None and self.post_process:
            self.log_z = PartitionFunction(self.config.hidden_size, dropout=log_z_dropout)

    def setup_embeddings_and_output_layer(self) -> None:
        """Put our output layer in place before Megatron marks and ties its weight."""
        if self.post_process and self._has_value_head:
            self.output_layer = ValueHead(
                self.config.hidden_size, self.pg_collection.tp, sequence_parallel=self.config.sequence_parallel
            )
        elif self.post_process:
            self.output_layer = LogProbOutputLayer(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=not self.parallel_output,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
                true_vocab_size=self._true_vocab_size,
            )
        super().setup_embeddings_and_output_layer()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, whose handling of the output layer's weight takes for granted that there is one."""
        if self._has_value_head:
            return MegatronModule.sharded_state_dict(self, *args, **kwargs)
        return super().sharded_state_dict(*args, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        requested = isinstance(labels, LogProbRequest | ValueRequest)
        if requested and self.post_process and self._has_value_head:
            values: TokenValues = self.output_layer(hidden_states, labels)
            return values
        if not (self.post_process and requested):
            labels = None if requested else labels
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        output: TokenLogProbs = self.output_layer(hidden_states, weight=weight, request=labels)
        if labels.log_z is None:
            return output
        log_z = prompt_log_z(
            self.log_z,
            hidden_states.squeeze(1),
            labels.log_z,
            tp_group=self.pg_collection.tp,
            cp_group=self.pg_collection.cp,
            sequence_parallel=self.config.sequence_parallel,
        )
        return replace(output, log_z=log_z)


def build_language_model(
    architecture: Architecture,
    config: TransformerConfig,
    precision: PrecisionConfig,
    platform: Platform,
    *,
    padded_vocab: int,
    vp_stage: int | None = None,
    log_z_dropout: float | None = None,
    value_head: bool = False,
) -> LanguageModel:
    """Build this rank's part of the model; its weights are allocated, not initialised."""
    stage = {"vp_stage": vp_stage, "ignore_virtual": vp_stage is None}
    model = LanguageModel(
        config=config,
        transformer_layer_spec=decoder_spec(config, precision, platform, vp_stage),
        vocab_size=padded_vocab,
        max_sequence_length=architecture.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings and not value_head,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        vp_stage=vp_stage,
        true_vocab_size=architecture.vocab_size,
        log_z_dropout=log_z_dropout,
        value_head=value_head,
    )
    # Megatron has one kind of scaling, with constants of its own.
    model.rotary_pos_emb.inv_freq = torch.tensor(architecture.rope_inv_freq, device=platform.device)
    _mark_tensor_parallel_parameters(model)
    return model


def _mark_tensor_parallel_parameters(model: torch.nn.Module) -> None:
    """Say of each cut parameter how it is cut, as Megatron does only when it draws initial weights itself.

    Without the mark a parameter counts as a copy, and gradient norms leave it out on all but the first rank.
    """
    for name, module in model.named_modules():
        if isinstance(module, tensor_parallel.RowParallelLinear):
            cut, dim, stride = [module.weight], 1, 1
        elif isinstance(module, tensor_parallel.ColumnParallelLinear):
            cut, dim, stride = [module.weight, module.bias], 0, 2 if name.endswith("linear_fc1") else 1
        elif isinstance(module, tensor_parallel.VocabParallelEmbedding):
            cut, dim, stride = [module.weight], 0, 1
        else:
            continue
        for parameter in cut:
            if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, dim, stride)
