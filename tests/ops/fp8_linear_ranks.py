"""Worker of test_fp8_linear.py: a weight in equal parts over the ranks gives what one rank gives, gradients included.

torchrun ... -m tests.ops.fp8_linear_ranks
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_flowrl.ops.fp8_linear import RECIPES, Fp8Products, fp8_linear

TOKENS, INPUTS, OUTPUTS = 160, 256, 512


def results(
    x: Tensor, w: Tensor, bias: Tensor, dy: Tensor, recipe: str, group: dist.ProcessGroup | None, cut: bool
) -> list[Tensor]:
    """Output, and the gradients of input, weight and bias, of a second pass."""
    products = Fp8Products(recipe, "hybrid", group=group)
    for _ in range(2):
        x, w, bias = (one.detach().clone().requires_grad_() for one in (x, w, bias))
        y = fp8_linear(x, w, bias, products, group=group, sequence_parallel=cut)
        y.backward(dy)
    assert x.grad is not None and w.grad is not None and bias.grad is not None
    return [y.detach(), x.grad, w.grad, bias.grad]


def check(recipe: str, cut: bool) -> None:
    """`cut`: with sequence parallelism. In fp32, where sums over ranks round least."""
    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()
    x, w, bias, dy = (
        torch.randn(TOKENS, INPUTS),
        torch.randn(OUTPUTS, INPUTS),
        torch.randn(OUTPUTS),
        torch.randn(TOKENS, OUTPUTS),
    )
    rows = slice(rank * OUTPUTS // size, (rank + 1) * OUTPUTS // size)
    tokens = slice(rank * TOKENS // size, (rank + 1) * TOKENS // size) if cut else slice(None)
    for part in range(size):  # every part has the same largest magnitudes: one scale of a whole tensor fits all
        w[part * OUTPUTS // size, 3], dy[5, part * OUTPUTS // size] = 6.0, 6.0
    y, dx, dw, db = results(x, w, bias, dy, recipe, None, False)
    expected = [y[:, rows], dx[tokens], dw[rows], db[rows]]
    found = results(x[tokens], w[rows], bias[rows], dy[:, rows], recipe, group, cut)
    for of_ranks, of_one in zip(found, expected, strict=True):
        assert of_one.norm() > 0
        torch.testing.assert_close(of_ranks, of_one, rtol=1e-5, atol=1e-5 * of_one.abs().max().item())


def check_common_scales() -> None:
    """Delayed scales are of the largest magnitude on any rank."""
    group = dist.group.WORLD
    assert group is not None
    products = Fp8Products("delayed", "e4m3", group=group)
    x, w = torch.full((16, 32), 2.0 ** group.rank()), torch.ones(16, 32, requires_grad=True)
    for _ in range(2):
        fp8_linear(x, w, None, products).sum().backward()
    largest = 2.0 ** (group.size() - 1)
    assert products.delayed["input"].scale.item() == 448 / largest and products.delayed["weight"].scale.item() == 448


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    check_common_scales()
    for recipe in RECIPES:
        for cut in (False, True):
            check(recipe, cut)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
