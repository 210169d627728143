"""Times linear_log_prob on one GPU, forward and backward, and its memory, against the plain way through the logits.

    python benchmarks/gpu/linear_log_prob.py > linear_log_prob_gpu.json    the table goes to stderr

8,192 tokens, Qwen2.5-7B's vocabulary and hidden size, bf16. Memory is torch's peak above the inputs, gradients
included. The gradients' distance is from fp32 products of the same numbers, over the norm of those.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from _report import circumstances

from megatron_flowrl.ops.linear_log_prob import linear_log_prob, plain_log_prob

TOKENS, VOCABULARY, HIDDEN_SIZE, TEMPERATURE = 8192, 152_064, 3584, 1.0
ROUNDS = 10

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_log_prob(hidden, weight, labels, temperature=TEMPERATURE)[0]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return plain_log_prob(hidden, weight, labels, temperature=TEMPERATURE)[0]


def measure(method: LogProbs, hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, float]:
    """Median milliseconds of each direction, and peak memory."""
    times: list[list[float]] = [[], []]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(ROUNDS + 2):
        hidden.grad = weight.grad = None
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        loss = method(hidden, weight, labels).sum()
        marks[1].record()
        loss.backward()
        marks[2].record()
        torch.cuda.synchronize()
        for direction in (0, 1):
            times[direction].append(marks[direction].elapsed_time(marks[direction + 1]))
    forward, backward = (sorted(direction[2:])[ROUNDS // 2] for direction in times)
    work = 6 * TOKENS * VOCABULARY * HIDDEN_SIZE
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "tflops": work / (forward + backward) / 1e9,
    }


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    draw = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN_SIZE, generator=draw, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN_SIZE, generator=draw, device="cuda") / 60).to(torch.bfloat16)
    weight.requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw, device="cuda")
    methods: dict[str, LogProbs] = {"ours": ours, "plain": plain}
    results: dict[str, dict[str, float]] = {}
    exact_hidden, exact_weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    exact = ours(exact_hidden, exact_weight, labels)
    exact.sum().backward()
    for name, method in methods.items():
        results[name] = measure(method, hidden, weight, labels)
        found = method(hidden, weight, labels)
        results[name]["log_prob_error"] = float((found - exact).abs().max())
        for which, tensor, truth in (("hidden", hidden, exact_hidden), ("weight", weight, exact_weight)):
            assert tensor.grad is not None and truth.grad is not None
            results[name][f"{which}_gradient_distance"] = float(
                (tensor.grad.float() - truth.grad).norm() / truth.grad.norm()
            )
        print(name, {key: round(value, 6) for key, value in results[name].items()}, file=sys.stderr)
    about = circumstances() | {"device": torch.cuda.get_device_name()}
    print(json.dumps(about | {"tokens": TOKENS, "vocabulary": VOCABULARY, "hidden": HIDDEN_SIZE, "results": results}))


if __name__ == "__main__":
    main()
