"""linear_log_prob: its values and gradients against the plain twin, Megatron's gradient protocol, and its memory."""

from __future__ import annotations

import math
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_flowrl.ops import linear_log_prob as module
from megatron_flowrl.ops.linear_log_prob import linear_log_prob, plain_log_prob
from megatron_flowrl.ops.matmul import Matmul
from megatron_flowrl.ops.tiles import tile_shape
from tests.distributed.ranks import run_worker

TOKENS, VOCABULARY, HIDDEN_SIZE = 37, 301, 24
SMALLEST_CHUNK = 32 * (HIDDEN_SIZE + 1)
# One cell a tile up to one tile; the sizes between leave ragged tiles at the end of both dimensions.
CHUNKS = [SMALLEST_CHUNK, 5_000, 20_000, 1 << 30]
SEVERAL_BLOCKS, ONE_BLOCK = 5_000, 1 << 30


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels; logits have a standard deviation of about 2.5."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN_SIZE, generator=random)
    weight = torch.randn(VOCABULARY, HIDDEN_SIZE, generator=random) / 2
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, VOCABULARY, (tokens,), generator=random)


def results(function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    """Log-probs, entropies if any, and the gradients of hidden and weight under a loss that uses all that has one."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_probs, entropies = function(hidden, weight, labels, **{"temperature": 1.0, **options})
    factor = torch.linspace(-1, 2, len(labels), dtype=log_probs.dtype)
    loss = (log_probs * factor).sum()
    if entropies is not None and entropies.requires_grad:
        loss = loss + (entropies * factor.flip(0)).sum()
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [x.detach() for x in (log_probs, entropies, hidden.grad, weight.grad) if x is not None]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Equal to `tolerance` of the largest element of each."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


@pytest.mark.parametrize("entropy", ["none", "detached", "differentiable"])
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_the_twin(dtype: torch.dtype, tolerance: float, chunk_bytes: int, entropy: str) -> None:
    options: dict[str, Any] = {"entropy": entropy, "temperature": 0.6}
    actual = results(linear_log_prob, *inputs(dtype), chunk_bytes=chunk_bytes, **options)
    assert_close(actual, results(plain_log_prob, *inputs(dtype), **options), tolerance)
    assert actual[0].dtype == dtype


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_temperatures(temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "entropy": "differentiable"}
    actual = results(linear_log_prob, *inputs(), chunk_bytes=20_000, **options)
    assert_close(actual, results(plain_log_prob, *inputs(), **options), 1e-5)


def test_gradients_by_finite_differences() -> None:
    hidden, weight, labels = inputs(torch.float64, tokens=3)
    hidden, weight = hidden[:, :4].clone().requires_grad_(), weight[:7, :4].clone().requires_grad_()

    def function(hidden: Tensor, weight: Tensor) -> Any:
        return linear_log_prob(
            hidden, weight, labels % 7, temperature=0.7, chunk_bytes=400, entropy="differentiable", vocab_size=7
        )

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_log_probs_do_not_depend_on_entropy() -> None:
    """The log-probs of an old-policy pass without entropy and of a training pass with it are the same bits."""
    log_probs = [
        linear_log_prob(*inputs(), temperature=0.6, chunk_bytes=20_000, entropy=entropy)[0]
        for entropy in ("none", "detached", "differentiable")
    ]
    assert log_probs[0].equal(log_probs[1]) and log_probs[0].equal(log_probs[2])


def test_labels_in_one_tile() -> None:
    hidden, weight, labels = inputs()
    for first in (0, VOCABULARY - 3):
        near = labels % 3 + first
        actual = results(linear_log_prob, hidden, weight, near, chunk_bytes=5_000)
        assert_close(actual, results(plain_log_prob, hidden, weight, near), 1e-5)


def test_gradient_of_a_confident_token() -> None:
    """1 - p = 1e-5 under a logit of 30: a log-sum-exp in fp32 would be off by a tenth of it."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[30.0, 1.0], [30.0 + math.log(1e-5), 0.0]])
    log_probs, _ = linear_log_prob(hidden, weight, torch.tensor([0]), temperature=1.0, chunk_bytes=1000)
    log_probs.sum().backward()
    assert hidden.grad is not None
    assert log_probs.item() == pytest.approx(-1e-5, rel=0.02)
    assert hidden.grad[0, 1].item() == pytest.approx(1e-5, rel=0.02)


class CudaLikeMatmul(Matmul):
    """Products as CUDA has them, bf16 factors and fp32 results, on a CPU."""

    @property
    def factor_dtype(self) -> torch.dtype:
        return self.model_dtype

    def product(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == self.model_dtype
        return out.copy_(a.float() @ b.float())


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("matmul", [Matmul, CudaLikeMatmul])
def test_bf16(monkeypatch: pytest.MonkeyPatch, matmul: type[Matmul], chunk_bytes: int) -> None:
    """Log-probs are those of the bf16 inputs to 1e-5. Rounding the logits to bf16, as the twin does, costs 1e-2."""
    monkeypatch.setattr(module, "Matmul", matmul)
    options = {"entropy": "differentiable", "temperature": 0.6}
    hidden, weight, labels = inputs(torch.bfloat16)
    actual = results(linear_log_prob, hidden, weight, labels, chunk_bytes=chunk_bytes, **options)
    expected = results(plain_log_prob, hidden.double(), weight.double(), labels, **options)
    rounded = results(plain_log_prob, hidden, weight, labels, **options)
    assert [x.dtype for x in actual] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for value in (0, 1):
        assert (actual[value] - expected[value]).abs().max() < 1e-5
        assert (rounded[value] - expected[value]).abs().max() > 5e-3
    assert_close(actual[2:], expected[2:], 5e-3)


def test_the_precision_switch_is_restored() -> None:
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    with pytest.raises(ZeroDivisionError), Matmul(torch.bfloat16, torch.device("cpu")).precision():
        assert switch.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert switch.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("main_grad", [None, torch.float32, torch.bfloat16])
def test_cuda_products_on_fake_tensors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, main_grad: torch.dtype | None
) -> None:
    """The calls made on CUDA exist and fit together, and none makes the host wait: fake tensors have no values."""
    monkeypatch.setattr(module, "Matmul", lambda dtype, device: Matmul(dtype, torch.device("cuda")))
    with FakeTensorMode():
        hidden, labels = torch.empty(500, 64, dtype=dtype, requires_grad=True), torch.empty(500, dtype=torch.int64)
        weight: Any = Parameter(torch.empty(3000, 64, dtype=dtype))
        weight.main_grad = torch.empty(3000, 64, dtype=main_grad or dtype)
        log_probs, entropies = linear_log_prob(
            hidden,
            weight,
            labels,
            temperature=0.6,
            vocab_size=2990,
            chunk_bytes=1 << 18,
            entropy="differentiable",
            accumulate_into_main_grad=main_grad is not None,
        )
        assert entropies is not None
        (log_probs + entropies).sum().backward()
        assert log_probs.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == dtype
        assert (weight.grad is None) == (main_grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_padded_vocabulary(dtype: torch.dtype, chunk_bytes: int) -> None:
    hidden, weight, labels = inputs(dtype)
    weight[290:] = 50  # would win every softmax
    options = {"vocab_size": 290, "entropy": "differentiable"}
    actual = results(linear_log_prob, hidden, weight, labels % 290, chunk_bytes=chunk_bytes, **options)
    unpadded = results(
        linear_log_prob, hidden, weight[:290], labels % 290, chunk_bytes=chunk_bytes, entropy="differentiable"
    )
    assert actual[3][290:].count_nonzero() == 0
    actual[3] = actual[3][:290]
    assert all(a.equal(b) for a, b in zip(actual, unpadded, strict=True))


def test_no_tokens() -> None:
    hidden, weight, labels = inputs(tokens=0)
    log_probs, entropies, grad_hidden, grad_weight = results(
        linear_log_prob, hidden, weight, labels, chunk_bytes=5_000, entropy="differentiable"
    )
    assert log_probs.shape == entropies.shape == (0,) and grad_hidden.shape == (0, HIDDEN_SIZE)
    assert grad_weight.shape == weight.shape and grad_weight.count_nonzero() == 0


@pytest.mark.parametrize("wrong", [-100, -1, 290, VOCABULARY, 10**9])
def test_a_label_out_of_range_gives_nan(wrong: int) -> None:
    """Selected away, such a token leaves no trace in the gradients of the others."""
    hidden, weight, labels = inputs()
    labels = labels % 290
    labels[5] = wrong

    def masked(*tensors: Tensor, **options: Any) -> tuple[Tensor, None]:
        log_probs, _ = linear_log_prob(*tensors, **options)
        assert log_probs.isnan().nonzero().tolist() == [[5]]
        return torch.where(torch.arange(TOKENS) == 5, 0.0, log_probs), None

    options: dict[str, Any] = {"vocab_size": 290, "chunk_bytes": 5_000}
    _, grad_hidden, grad_weight = results(masked, hidden, weight, labels, **options)
    others = torch.arange(TOKENS) != 5
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    log_probs, _ = linear_log_prob(hidden[others], weight, labels[others], temperature=1.0, **options)
    (log_probs * torch.linspace(-1, 2, TOKENS)[others]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert_close([grad_hidden, grad_weight], [hidden.grad, weight.grad], 1e-6)


@pytest.mark.parametrize(("needs_hidden", "needs_weight"), [(True, False), (False, True)])
def test_one_gradient(needs_hidden: bool, needs_weight: bool) -> None:
    hidden, weight, labels = inputs()
    _, *expected = results(linear_log_prob, hidden, weight, labels, chunk_bytes=5_000)
    hidden.requires_grad_(needs_hidden)
    weight.requires_grad_(needs_weight)
    log_probs, _ = linear_log_prob(hidden, weight, labels, temperature=1.0, chunk_bytes=5_000)
    (log_probs * torch.linspace(-1, 2, TOKENS)).sum().backward()
    for tensor, gradient in zip((hidden, weight), expected, strict=True):
        assert tensor.grad.equal(gradient) if tensor.requires_grad else tensor.grad is None  # type: ignore[union-attr]


def test_entropy_alone_has_a_gradient() -> None:
    def gradient(function: Any, **options: Any) -> Tensor:
        hidden, weight, labels = inputs()
        _, entropies = function(
            hidden.requires_grad_(), weight, labels, temperature=0.7, entropy="differentiable", **options
        )
        entropies.sum().backward()
        assert hidden.grad is not None
        return hidden.grad

    assert_close([gradient(linear_log_prob, chunk_bytes=5_000)], [gradient(plain_log_prob)], 1e-5)


def test_detached_entropy_has_no_gradient() -> None:
    hidden, weight, labels = inputs()
    log_probs, entropies = linear_log_prob(
        hidden.requires_grad_(), weight, labels, temperature=1.0, chunk_bytes=5_000, entropy="detached"
    )
    assert log_probs.requires_grad and entropies is not None and not entropies.requires_grad


def megatron_parameter(weight: Tensor, main_grad_dtype: torch.dtype) -> Any:
    """A parameter as Megatron's DistributedDataParallel leaves it: main_grad, flag and DDP's own backward hook."""
    ddp = pytest.importorskip("megatron.core.distributed").DistributedDataParallel
    parameter = Parameter(weight.clone())
    tensor: Any = parameter
    tensor.main_grad = torch.ones(weight.shape, dtype=main_grad_dtype)
    tensor.grad_added_to_main_grad = False
    config = SimpleNamespace(overlap_grad_reduce=True)
    buckets = {parameter: SimpleNamespace(register_grad_ready=lambda *_: None)}
    hook = ddp._make_backward_post_hook(
        SimpleNamespace(ddp_config=config, param_to_bucket_group=buckets, force_all_reduce=False), parameter
    )
    tensor.accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    tensor.accumulator.register_hook(hook)
    return parameter


@pytest.mark.parametrize("chunk_bytes", [SEVERAL_BLOCKS, ONE_BLOCK])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "main_grad", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
)
def test_main_grad_under_megatron(
    dtype: torch.dtype, main_grad: torch.dtype, tolerance: float, tied: bool, chunk_bytes: int
) -> None:
    """Two micro-batches add to what is in main_grad already; a tied embedding's gradient arrives besides, once."""
    fused = megatron_parameter(inputs(dtype)[1], main_grad)
    plain = inputs(dtype)[1].double().requires_grad_()
    if tied:
        fused.zero_out_wgrad = True
    for seed in (0, 1):
        hidden, _, labels = inputs(dtype, seed=seed)
        ids = labels.flip(0)
        for weight in (fused, plain):
            x = hidden.to(weight.dtype)
            if tied:
                x = x + torch.nn.functional.embedding(ids, weight)
            if weight is fused:
                y, _ = linear_log_prob(
                    x, weight, labels, temperature=0.8, chunk_bytes=chunk_bytes, accumulate_into_main_grad=True
                )
            else:
                y, _ = plain_log_prob(x, weight, labels, temperature=0.8)
            y.sum().backward()
    assert fused.grad is None and fused.grad_added_to_main_grad and fused.main_grad.dtype == main_grad
    assert plain.grad is not None
    assert_close([fused.main_grad], [plain.grad + 1], tolerance)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_gradients_are_rounded_once(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """With exact products, gradients in bf16 are off by one rounding, however many tiles they are summed over."""
    monkeypatch.setattr(Matmul, "precision", lambda self: nullcontext())
    hidden, weight, labels = inputs(torch.bfloat16, tokens=300)
    actual = results(linear_log_prob, hidden, weight, labels, chunk_bytes=chunk_bytes)
    expected = results(plain_log_prob, hidden.double(), weight.double(), labels)
    for gradient in (1, 2):
        torch.testing.assert_close(actual[gradient].double(), expected[gradient], rtol=2**-8, atol=1e-4)


def test_main_grad_without_the_flag_of_ddp() -> None:
    """As from Megatron's linear: autograd gets nothing."""
    hidden, weight, labels = inputs()
    parameter: Any = Parameter(weight)
    parameter.main_grad = torch.zeros_like(weight)
    options: dict[str, Any] = {"temperature": 1.0, "chunk_bytes": 5_000, "accumulate_into_main_grad": True}
    linear_log_prob(hidden, parameter, labels, **options)[0].sum().backward()
    assert parameter.grad is None and parameter.main_grad.count_nonzero() > 0


def test_main_grad_is_asked_for_only_where_it_is_needed() -> None:
    """A frozen reference model and a pass without gradients have none."""
    hidden, weight, labels = inputs()
    options: dict[str, Any] = {"temperature": 1.0, "chunk_bytes": 5_000, "accumulate_into_main_grad": True}
    linear_log_prob(hidden, weight, labels, **options)
    with torch.no_grad():
        linear_log_prob(hidden, Parameter(weight), labels, **options)
    with pytest.raises(ValueError, match="main_grad"):
        linear_log_prob(hidden, Parameter(weight), labels, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"temperature": math.nan}, ValueError, "temperature=nan"),
        ({"chunk_bytes": SMALLEST_CHUNK - 1}, ValueError, f"chunk_bytes=.*{SMALLEST_CHUNK}"),
        ({"vocab_size": VOCABULARY + 1}, ValueError, "vocab_size=302"),
        ({"vocab_start": 1}, ValueError, "vocab_start=1"),
        ({"entropy": "both"}, ValueError, "entropy='both'"),
        ({"hidden": torch.zeros(TOKENS, 3)}, ValueError, "hidden"),
        ({"hidden": torch.zeros(TOKENS, HIDDEN_SIZE, dtype=torch.float64)}, TypeError, "the same"),
        ({"labels": torch.zeros(TOKENS)}, TypeError, "int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, labels = inputs()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "temperature": 1.0, "chunk_bytes": 5_000}
    with pytest.raises(error, match=message):
        linear_log_prob(**{**arguments, **options})


def test_half_precision_is_refused() -> None:
    hidden, weight, labels = inputs(torch.float16)
    with pytest.raises(TypeError, match="float16"):
        linear_log_prob(hidden, weight, labels, temperature=1.0, chunk_bytes=5_000)


@given(
    tokens=st.integers(0, 20_000),
    vocabulary=st.integers(0, 200_000),
    max_columns=st.sampled_from([512, 8192]),
    row_bytes=st.integers(0, 100_000),
    column_bytes=st.integers(0, 100_000),
    cell_bytes=st.integers(4, 16),
    spare=st.integers(0, 1 << 30),
)
def test_tile_shape_stays_within_its_bytes(
    tokens: int, vocabulary: int, max_columns: int, row_bytes: int, column_bytes: int, cell_bytes: int, spare: int
) -> None:
    chunk_bytes = 2 * (row_bytes + column_bytes + cell_bytes) + spare
    rows, columns = tile_shape(
        tokens,
        vocabulary,
        max_columns=max_columns,
        row_bytes=row_bytes,
        column_bytes=column_bytes,
        cell_bytes=cell_bytes,
        chunk_bytes=chunk_bytes,
    )
    assert 1 <= rows <= max(1, tokens) and 1 <= columns <= min(max_columns, max(1, vocabulary))
    assert rows * row_bytes + columns * column_bytes + rows * columns * cell_bytes <= chunk_bytes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators inside it have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = [x.untyped_storage() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not any(tensor.untyped_storage() is storage for storage in known):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, nbytes: int) -> None:
        self.now -= nbytes


def peak_bytes(tokens: int, dtype: torch.dtype, chunk_bytes: int, function: Any = linear_log_prob) -> int:
    """Peak memory of forward and backward beyond inputs and gradients, for a vocabulary of 152,064."""
    weight: Any = Parameter(torch.zeros(152_064, 8, dtype=dtype))
    options: dict[str, Any] = {"chunk_bytes": chunk_bytes} if function is linear_log_prob else {}
    if function is linear_log_prob:
        weight.main_grad, options["accumulate_into_main_grad"] = torch.zeros(weight.shape), True
    hidden = torch.zeros(tokens, 8, dtype=dtype, requires_grad=True)
    labels = torch.arange(tokens)
    with LiveBytes() as live:
        log_probs, _ = function(hidden, weight, labels, temperature=0.7, **options)
        log_probs.sum().backward()
    gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return live.peak - gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_tokens(dtype: torch.dtype) -> None:
    """16 times the tokens cost a few numbers per token more; a row of logits would be 608,256 bytes per token."""
    chunk_bytes, tokens = 1 << 19, 40
    peaks = [peak_bytes(times * tokens, dtype, chunk_bytes) for times in (1, 4, 16)]
    for times, peak in zip((1, 4, 16), peaks, strict=True):
        assert peak <= chunk_bytes + 128 * times * tokens
    assert peak_bytes(tokens, dtype, chunk_bytes, plain_log_prob) > 20 * peaks[0]


@pytest.mark.distributed
def test_ranks_with_a_part_of_the_vocabulary_each() -> None:
    run_worker("tests.ops.linear_log_prob_ranks", [], ranks=2)
