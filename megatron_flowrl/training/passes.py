"""One pass of the model over a plan's micro-batches: a single call of Megatron's schedule, whatever the layout.

Forward-only passes (reference, old log-probs, scoring) and training passes share the plan, the op and the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_flowrl.config import LogProbConfig
from megatron_flowrl.data.batch import PackedBatch, TokenSequence, pack_batch
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.model.gpt import EntropyMode, LogProbRequest, TokenLogProbs
from megatron_flowrl.model.packed_sequences import packed_sequences
from megatron_flowrl.model.partition_function import LogZRequest
from megatron_flowrl.platform.distributed import to_all_pipeline_stages

# (log-probs of the micro-batch, the micro-batch) -> scalar loss, the part of the mini-batch's loss it contributes
MicroBatchLoss = Callable[[TokenLogProbs, PackedBatch], Tensor]
RequestOf = Callable[[PackedBatch], Any]  # what the last stage is asked for
LogZOf = Callable[[PackedBatch], LogZRequest]


class Listener(Protocol):
    """What is told how far a pass is on this rank."""

    def micro_batch(self) -> None:
        """A micro-batch's forward pass is done; on stages before the last also: its backward pass begins."""

    def end(self) -> None:
        """All of this rank's micro-batches are done, before what all ranks do together."""


def local_batches(
    sequences: Sequence[TokenSequence], plan: PackingPlan, mini_batch: int, device: torch.device
) -> list[PackedBatch]:
    """The micro-batches of a mini-batch on this rank."""
    return [
        pack_batch(
            sequences,
            micro_batch,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            device=device,
        )
        for micro_batch in plan.for_rank(mini_batch, parallel_state.get_data_parallel_rank())
    ]


def forward_backward(
    model: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    settings: LogProbConfig,
    loss: MicroBatchLoss,
    *,
    entropy: EntropyMode = "none",
    log_z: LogZOf | None = None,
    listener: Listener | None = None,
) -> Tensor:
    """Accumulate the gradients of the losses of all micro-batches, summed over them and over data-parallel ranks.

    `log_z` makes the request for the partition function, where the model has one and the loss uses it.

    `loss` divides by the mini-batch's global number of sequences (`PackingPlan.num_sequences`) itself. Gradients are
    in `main_grad` afterwards, reduced as far as Megatron reduces them before an optimizer step. Returns the sum of
    the losses of this rank's micro-batches, fp32 [], on every pipeline stage.
    """

    return train_on(model, batches, _log_probs(settings, entropy, log_z), loss, listener)


def train_on(
    model: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    request: RequestOf,
    loss: Callable[[Any, PackedBatch], Tensor],
    listener: Listener | None = None,
) -> Tensor:
    """`forward_backward` for whatever the last stage can be asked for."""

    def contribution(output: Any, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        value = loss(output, batch)
        # The second is Megatron's count of tokens, which `finalize_gradients` does not divide by.
        # A copy of the value: Megatron frees the last stage's output, and refuses to where that is a view.
        return value.clone(), torch.zeros((), dtype=torch.int, device=value.device), value.detach()

    with _before_reductions(model, listener):
        values = _run(model, batches, request, contribution, forward_only=False, listener=listener)
    total = torch.stack(values).sum() if values else torch.zeros((), device=batches[0].input_ids.device)
    return to_all_pipeline_stages(total.float())


@torch.no_grad()
def forward_only(
    model: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    settings: LogProbConfig,
    *,
    entropy: EntropyMode = "none",
    listener: Listener | None = None,
) -> list[TokenLogProbs]:
    """Log-probs of every micro-batch, on the last pipeline stage; an empty list on the others."""
    return ask(model, batches, _log_probs(settings, entropy), listener)


@torch.no_grad()
def ask(
    model: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    request: RequestOf,
    listener: Listener | None = None,
) -> list[Any]:
    """`forward_only` for whatever the last stage can be asked for."""

    def collect(output: Any, batch: PackedBatch) -> tuple[Tensor, Tensor, Any]:
        nothing = torch.zeros((), device=batch.input_ids.device)
        return nothing, nothing.int(), output

    results = _run(model, batches, request, collect, forward_only=True, listener=listener)
    if listener is not None:
        listener.end()
    return results


def _log_probs(settings: LogProbConfig, entropy: EntropyMode, log_z: LogZOf | None = None) -> RequestOf:
    return lambda batch: LogProbRequest(
        rows=batch.rows,
        labels=batch.labels,
        temperature=settings.temperature,
        chunk_bytes=settings.chunk_bytes,
        entropy=entropy,
        log_z=None if log_z is None else log_z(batch),
    )


@contextmanager
def _before_reductions(model: Sequence[torch.nn.Module], listener: Listener | None) -> Iterator[None]:
    """Have Megatron's schedule tell it of the end between the last backward pass and the reductions of gradients."""
    if listener is None:
        yield
        return
    settings = get_model_config(model[0])
    finalize = settings.finalize_model_grads_func

    def first_at_end(*args: Any, **kwargs: Any) -> Any:
        listener.end()
        return finalize(*args, **kwargs)

    settings.finalize_model_grads_func = first_at_end
    try:
        yield
    finally:
        settings.finalize_model_grads_func = finalize


def _run(
    model: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    request: RequestOf,
    on_output: Callable[[Any, PackedBatch], tuple[Tensor, Tensor, Any]],
    *,
    forward_only: bool,
    listener: Listener | None,
) -> list[Any]:
    cp_rank = parallel_state.get_context_parallel_rank()
    cp_size = parallel_state.get_context_parallel_world_size()

    def forward_step(iterator: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(iterator)
        output = chunk(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            labels=request(batch),
            packed_seq_params=packed_sequences(batch.boundaries, cp_rank, cp_size, batch.input_ids.device),
        )
        if listener is not None:
            listener.micro_batch()
            if isinstance(output, Tensor) and output.requires_grad:  # a stage before the last: its backward, too
                output.register_hook(lambda _: listener.micro_batch())
        return output, lambda result: on_output(result, batch)

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model],
        model=list(model),
        num_microbatches=len(batches),
        seq_length=max(batch.input_ids.shape[1] for batch in batches) * cp_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results


@dataclass(frozen=True)
class ScoredTokens:
    """Per-token results of a whole plan, on every rank: fp32 [all response tokens], sequence by sequence."""

    log_probs: Tensor
    entropy: Tensor | None
    offsets: tuple[int, ...]  # where each sequence's response begins, and the end

    def of_sequence(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies of one sequence's response tokens."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.log_probs[part], None if self.entropy is None else self.entropy[part]


def gather_tokens(
    sequences: Sequence[TokenSequence],
    batches: Sequence[PackedBatch],
    outputs: Sequence[TokenLogProbs],
    *,
    entropy: bool,
) -> ScoredTokens:
    """Bring the last stage's results to every rank, in the order of `sequences`."""
    values = [[o.log_probs, o.entropy] if entropy and o.entropy is not None else [o.log_probs] for o in outputs]
    flat, offsets = gather_rows(sequences, batches, values, 2 if entropy else 1)
    return ScoredTokens(flat[0], flat[1] if entropy else None, offsets)


def gather_rows(
    sequences: Sequence[TokenSequence], batches: Sequence[PackedBatch], outputs: Sequence[Sequence[Tensor]], count: int
) -> tuple[Tensor, tuple[int, ...]]:
    """`count` tensors [N] of each micro-batch, known to the last stage -> fp32 [count, all response tokens], offsets.

    One sum and one broadcast: each response token is known to one (data, context)-parallel rank; the others add zero,
    which is exact.
    """
    offsets = [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence.response))
    device = batches[0].input_ids.device
    flat = torch.zeros((count, offsets[-1]), dtype=torch.float32, device=device)
    for batch, output in zip(batches if outputs else (), outputs, strict=True):  # only the last stage has outputs
        starts = torch.tensor([offsets[i] for i in batch.sequences], dtype=torch.int64, device=device)
        places = starts[batch.sequence_of_row] + batch.response_index
        for row, values in zip(flat, output, strict=True):
            row[places] = values
    if outputs:
        torch.distributed.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    to_all_pipeline_stages(flat)
    return flat, tuple(offsets)
