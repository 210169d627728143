"""The linear layer of FP8 numbers gives what Transformer Engine's gave on an H200, and the same over several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_flowrl.ops.fp8 import ROW, SQUARE, Block, Format, quantize
from megatron_flowrl.ops.fp8_linear import RECIPES, DelayedScale, Fp8Products, fp8_linear, product
from tests.distributed.ranks import run_worker
from tests.ops.fp8_numbers import KEPT, RECORDED, numbers


@pytest.fixture(scope="module")
def recorded() -> Any:
    """Parts of products."""
    with safe_open(RECORDED, "pt") as file:
        yield file


@pytest.mark.parametrize("formats", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed"])
def test_outputs_and_gradients_are_transformer_engines(recipe: str, formats: Any, recorded: Any) -> None:
    """Up to the order of sums: FP8 itself is ten and more times as far from the product of what was given."""
    products = Fp8Products(recipe, formats)
    for step in (0, 1):
        given = numbers(step)
        x, w = given["x"].requires_grad_(), given["w"].requires_grad_()
        y = fp8_linear(x, w, None, products)
        y.backward(given["dy"])
        exact = {
            "y": x.float() @ w.float().t(),
            "dx": given["dy"].float() @ w.float(),
            "dw": given["dy"].float().t() @ x.float(),
        }
        for name, values in {"y": y, "dx": x.grad, "dw": w.grad}.items():
            assert values is not None
            theirs = recorded.get_tensor(f"{recipe}.{formats}.{step}.{name}").float()
            ours, unquantised = values.detach()[KEPT].float(), exact[name].detach()[KEPT]
            distance = (ours - theirs).norm() / theirs.norm()
            assert distance < 2e-3 and (ours == theirs).float().mean() > 0.9
            assert (unquantised - theirs).norm() / theirs.norm() > 10 * distance


@pytest.mark.parametrize(("left", "right"), [(None, None), (ROW, SQUARE), ((1, 32), (1, 32))])
@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_products_of_fp8_numbers_are_exact(form: Format, left: Block, right: Block) -> None:
    draw = torch.Generator().manual_seed(4)
    a = quantize(torch.randn(70, 300, generator=draw), form, left)
    b = quantize(torch.randn(50, 300, generator=draw) / 16, "e4m3", right)
    exact = a.dequantize().double() @ b.dequantize().double().t()
    torch.testing.assert_close(
        product(a, b, right_transposed=True).double(), exact, rtol=0, atol=2e-6 * exact.abs().max()
    )


def test_a_product_is_pytorchs_own_of_fp8_tensors() -> None:
    draw = torch.Generator().manual_seed(5)
    a, b = (quantize(torch.randn(64, 128, generator=draw), "e4m3", None) for _ in range(2))
    theirs = torch._scaled_mm(a.data, b.data.t(), a.inverse[0, 0], b.inverse[0, 0], out_dtype=torch.float32)
    torch.testing.assert_close(product(a, b, right_transposed=True), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pass_without_gradients_gives_the_same(recipe: str) -> None:
    x, w, bias = (numbers(0)[name] for name in ("x", "w", "w"))
    bias = bias[:, 0].clone().requires_grad_()
    w.requires_grad_()
    products = Fp8Products(recipe, "hybrid")
    with torch.no_grad():
        before = fp8_linear(x, w, bias, products)
    y = fp8_linear(x, w, bias, products)
    assert torch.equal(y, before) and torch.equal(
        fp8_linear(x.view(2, -1, x.shape[1]), w, bias, Fp8Products(recipe, "hybrid")).view_as(y), y
    )
    (y.float() * 1.0).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full_like(bias, len(x)))


def test_recipes_differ_as_they_should() -> None:
    """An outlier takes the small numbers of a whole tensor with it, and of its block only."""
    draw = torch.Generator().manual_seed(6)
    x, w = torch.randn(256, 256, generator=draw).bfloat16(), torch.randn(256, 256, generator=draw).bfloat16()
    x[0, 0] = 2.0**20
    rest = slice(128, None)
    exact = (x.float() @ w.float().t())[rest]
    error = {
        recipe: (
            (fp8_linear(x, w, None, Fp8Products(recipe, "e4m3")).float()[rest] - exact).norm() / exact.norm()
        ).item()
        for recipe in ("tensorwise", "blockwise", "mxfp8")
    }
    assert error["tensorwise"] > 0.9 and error["blockwise"] < 0.05 and error["mxfp8"] < 0.05


def test_gradients_are_coarser_in_hybrid_and_reach_farther() -> None:
    x, w = torch.eye(128).bfloat16(), torch.eye(128).bfloat16().requires_grad_()
    found = {}
    for formats in ("hybrid", "e4m3"):
        products = Fp8Products("delayed", formats)  # scales of 1: what is above the format's range is cut
        y = fp8_linear(x.clone().requires_grad_(), w, None, products)
        (found[formats],) = torch.autograd.grad(y, w, torch.full_like(y, 1000.0))
    assert found["e4m3"].amax() == 448.0 and found["hybrid"].amax() == 1024.0


def test_delayed_scales_are_those_of_passes_before() -> None:
    latest, longest = (DelayedScale("e4m3", 1, 3, algo) for algo in ("most_recent", "max"))
    for largest, expected in (
        (2.0, (112.0, 112.0)),
        (7.0, (32.0, 32.0)),
        (1.0, (224.0, 32.0)),
        (4.0, (56.0, 32.0)),
        (4.0, (56.0, 56.0)),
    ):
        for scale, wanted in zip((latest, longest), expected, strict=True):
            scale.take(torch.tensor([[-largest, 0.5]]))
            scale.update(scale.history[0].clone())
            assert scale.scale.item() == wanted
    latest.update(torch.tensor(0.0))  # nothing but zeros: as it was
    assert latest.scale.item() == 56.0


def test_passes_without_gradients_do_not_move_delayed_scales() -> None:
    x, w = numbers(0)["x"], numbers(0)["w"].requires_grad_()
    products = Fp8Products("delayed", "e4m3")
    with torch.no_grad():
        first, second = (fp8_linear(x, w, None, products) for _ in range(2))
    third = fp8_linear(x, w, None, products)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert not torch.equal(fp8_linear(x, w, None, products), third)


def test_a_frozen_layers_scales_move_with_the_passes_of_the_trained() -> None:
    """As Transformer Engine updates those of all modules where a training pass ends: a reference is scaled, too."""
    x, w = numbers(0)["x"], numbers(0)["w"]
    trained, frozen = (Fp8Products("delayed", "e4m3", history_len=2, algo="max") for _ in range(2))
    with torch.no_grad():
        first = fp8_linear(x, w, None, frozen)
    for _ in range(2):  # in the second the first is over
        fp8_linear(x, w.requires_grad_(), None, trained)
    with torch.no_grad():
        second, third = (fp8_linear(x, w, None, frozen) for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(second, third)
    largest = x.float().abs().max()
    assert frozen.delayed["input"].scale.item() == pytest.approx(448 / largest.item())


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_two_ranks_give_what_one_gives() -> None:
    run_worker("tests.ops.fp8_linear_ranks", [], 2)
