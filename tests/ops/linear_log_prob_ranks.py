"""Worker of test_linear_log_prob.py: a vocabulary in equal parts over the ranks gives what one rank gives.

torchrun ... -m tests.ops.linear_log_prob_ranks
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from megatron_flowrl.ops.linear_log_prob import linear_log_prob

VOCABULARY, VOCAB_SIZE, HIDDEN_SIZE = 64, 58, 16
OPTIONS: dict[str, Any] = {
    "temperature": 0.7,
    "vocab_size": VOCAB_SIZE,
    "entropy": "differentiable",
    "chunk_bytes": 3000,
}


def results(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[list[Tensor], list[int]]:
    """Log-probs, entropies and both gradients, and the number of collectives in each direction."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with CommDebugMode() as forward:
        log_probs, entropies = linear_log_prob(hidden, weight, labels, **OPTIONS, **options)
    assert entropies is not None
    factor = torch.linspace(-1, 1, len(labels))
    with CommDebugMode() as backward:
        (log_probs * factor + entropies * factor.flip(0)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    collectives = [forward.get_total_counts(), backward.get_total_counts()]
    return [log_probs.detach(), entropies.detach(), hidden.grad, weight.grad], collectives


def check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    group = dist.group.WORLD
    assert group is not None
    rows = VOCABULARY // group.size()
    vocab_start = rows * group.rank()
    whole, collectives = results(hidden, weight, labels)
    assert collectives == [0, 0]
    part, collectives = results(
        hidden, weight[vocab_start : vocab_start + rows], labels, vocab_start=vocab_start, tp_group=group
    )
    assert collectives == [2, 0]
    dist.all_reduce(part[2])
    whole[3] = whole[3][vocab_start : vocab_start + rows]
    for of_ranks, of_one in zip(part, whole, strict=True):
        torch.testing.assert_close(of_ranks, of_one, rtol=1e-5, atol=1e-5)


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, HIDDEN_SIZE), torch.randn(VOCABULARY, HIDDEN_SIZE)
    check(hidden, weight, torch.randint(0, VOCAB_SIZE, (23,)))
    check(hidden, weight, torch.randint(0, VOCABULARY // 2, (23,)))
    check(hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
