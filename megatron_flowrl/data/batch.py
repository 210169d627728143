"""From token sequences and a plan's micro-batch to the tensors one context-parallel rank computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_flowrl.data.context_parallel import context_parallel_positions
from megatron_flowrl.data.packing import MicroBatch

_PADDING_TOKEN = 0  # any id of the vocabulary: nothing real ever attends to it, and nothing reads its output


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and the model's answer to it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch on one context-parallel rank: T of its tokens, N of them predicting a response token.

    input_ids, position_ids int64 [1, T]; boundaries: padded segments over all context-parallel ranks;
    rows int64 [N]: the tokens whose hidden states predict; labels int64 [N]: what they predict;
    sequence_of_row int64 [N]: number of the sequence within the micro-batch, [0, num_sequences);
    response_index int64 [N]: which token of the response is predicted;
    prompt_rows int64 [P]: the tokens of prompts; sequence_of_prompt_row int64 [P]: number of their sequence, as above;
    prompt_lengths, response_lengths int64 [num_sequences]: over all context-parallel ranks.
    """

    sequences: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    boundaries: tuple[int, ...]
    rows: Tensor
    labels: Tensor
    sequence_of_row: Tensor
    response_index: Tensor
    prompt_rows: Tensor
    sequence_of_prompt_row: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    @property
    def num_sequences(self) -> int:
        """Sequences of the micro-batch; 0 for a filler."""
        return len(self.sequences)


def pack_batch(
    sequences: Sequence[TokenSequence],
    micro_batch: MicroBatch,
    *,
    cp_rank: int = 0,
    cp_size: int = 1,
    device: torch.device | None = None,
) -> PackedBatch:
    """Lay the micro-batch's sequences end to end and cut out what this context-parallel rank holds.

    The token at position p predicts the one at p + 1, wherever that token lives: labels are found before the cut.
    """
    boundaries = micro_batch.cu_seqlens
    input_ids = torch.full((boundaries[-1],), _PADDING_TOKEN)
    labels = torch.full((boundaries[-1],), -1)
    sequence_of = torch.zeros(boundaries[-1], dtype=torch.int64)
    response_index = torch.zeros(boundaries[-1], dtype=torch.int64)
    prompt_of = torch.full((boundaries[-1],), -1)
    for number, (index, start) in enumerate(zip(micro_batch.sequences, boundaries, strict=False)):
        sequence = sequences[index]
        tokens = torch.tensor([*sequence.prompt, *sequence.response])
        input_ids[start : start + len(tokens)] = tokens
        first, last = start + len(sequence.prompt) - 1, start + len(tokens) - 1
        labels[first:last] = tokens[len(sequence.prompt) :]
        sequence_of[first:last] = number
        prompt_of[start : first + 1] = number
        response_index[first:last] = torch.arange(len(sequence.response))
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(boundaries)])
    local = torch.tensor(context_parallel_positions(boundaries, cp_size, cp_rank))
    rows = torch.nonzero(labels[local] >= 0).squeeze(1)
    predicting = local[rows]
    prompt_rows = torch.nonzero(prompt_of[local] >= 0).squeeze(1)
    packed = [sequences[index] for index in micro_batch.sequences]

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device) if device is not None else tensor

    return PackedBatch(
        sequences=micro_batch.sequences,
        input_ids=placed(input_ids[local].unsqueeze(0)),
        position_ids=placed(positions[local].unsqueeze(0)),
        boundaries=boundaries,
        rows=placed(rows),
        labels=placed(labels[predicting]),
        sequence_of_row=placed(sequence_of[predicting]),
        response_index=placed(response_index[predicting]),
        prompt_rows=placed(prompt_rows),
        sequence_of_prompt_row=placed(prompt_of[local][prompt_rows]),
        prompt_lengths=placed(torch.tensor([len(s.prompt) for s in packed], dtype=torch.int64)),
        response_lengths=placed(torch.tensor([len(s.response) for s in packed], dtype=torch.int64)),
    )
