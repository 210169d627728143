"""From hidden states and the output weight to the log-probability of each label, without the logits.

The usual way makes a [tokens, vocabulary] tensor several times over: for 4,096 tokens and a vocabulary of 152,064 each
fp32 copy takes 2.5 GB. `linear_log_prob` makes a tile of it, uses it at once, and makes it again in the backward pass:
four products instead of three, for memory that grows with neither.

With logits x = hidden @ weight.T, y = x / temperature and p = softmax(y)

    log_prob = log p[label]             d log_prob / d y_j = [j = label] - p_j
    H = -sum_j p_j log p_j              d H / d y_j        = -p_j (log p_j + H)          (the entropy)

The forward pass walks over the vocabulary with three numbers per token, rescaled whenever the maximum rises (Milakov
and Gimelshein, "Online normalizer calculation for softmax", 2018)

    m = max_j y_j,    s = sum_j exp(y_j - m),    t = sum_j exp(y_j - m) (y_j - m)

so that log p_j = y_j - m - log s and H = log s - t / s. Tensor-parallel ranks, each with a part of the vocabulary,
exchange m, then the sums. m and s are saved: the backward pass makes p from them, and has nothing to exchange. (They
are saved apart because m + log s is off by up to 1e-6 in fp32, which is a lot for 1 - p where p is close to 1.)

Letters in names are dimensions: N tokens, R of them in a block of rows, V rows of the weight, C of them in a tile
(the columns of its logits), h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_flowrl.ops.matmul import Matmul, wide_dtype
from megatron_flowrl.ops.tiles import CHUNK_BYTES_PER_HIDDEN, Buffers, Tiles

Entropy = Literal["none", "detached", "differentiable"]
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 2**26, 2**28


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    entropy: Entropy = "none",
    accumulate_into_main_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label under softmax(hidden @ weight.T / temperature), and the entropy of that softmax.

    hidden [N, h] and weight [V, h] are bf16, fp32 or fp64, both alike; labels [N] are int64 ids of the whole
    vocabulary. This rank's weight begins with id `vocab_start`; the ranks of `tp_group` have equally many rows, and
    the same hidden and labels. Ids from `vocab_size` on (default: none) are padding: not in the softmax, and with a
    gradient of exactly zero. Returns fp32 [N] log-probs and fp32 [N] entropies, in nats (fp64 for fp64). The entropy
    is None for "none", and has a gradient for "differentiable" only.

    Precision. Logits are fp32 sums of products, and nothing on the way to the results is rounded further. Gradients
    are summed in fp32 and rounded once, to the dtype of their tensor. For bf16 the gradient of the logits enters its
    two products in bf16, as it does in a linear layer.

    Labels. One outside [0, vocab_size) gets the log-prob NaN: raising would make the host wait for the GPU, and any
    number would pass for a log-prob. Mask it with torch.where, for NaN times zero is NaN.

    Tensor parallelism. The gradient of hidden is *partial*: what this rank's rows of the weight contribute. As around
    Megatron's ColumnParallelLinear, the mapping that gave hidden (copy_to_tensor_model_parallel_region, or
    gather_from_sequence_parallel_region) adds up those of the group, each rounded to the dtype of hidden before.
    A group of several ranks makes two collectives forward, of [N] and [2 or 3, N] fp32, also for N = 0, and none
    backward.

    Gradient accumulation. With `accumulate_into_main_grad` the weight's gradient is added to `weight.main_grad` (fp32
    or bf16), by the protocol of Megatron's fused accumulation: see `_gradient_placeholder`.

    Memory. The working buffers of a direction take at most `chunk_bytes` (None: 64 MiB on a CPU and 256 MiB on a GPU,
    which wants larger products), whatever N and V. Beside them there are a dozen numbers a token, the gradients, and an
    fp32 copy of the weight's gradient if that is bf16 *and* the tokens are more than one block of rows (4,096, or what
    fits into `chunk_bytes`).

    Raises TypeError for dtypes and ValueError for any other argument that cannot be honoured.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if chunk_bytes is None:
        chunk_bytes = GPU_CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES
    options = _Options(
        inverse_temperature=1 / temperature,
        vocab_start=vocab_start,
        vocab_size=weight.shape[0] * _ranks(tp_group) if vocab_size is None else vocab_size,
        tp_group=tp_group,
        chunk_bytes=chunk_bytes,
        entropy=entropy,
        accumulate_into_main_grad=accumulate_into_main_grad,
    )
    _check_tensors(hidden, weight, labels)
    _check_options(options, weight)
    log_probs, entropies = _LinearLogProb.apply(hidden, weight, labels, options)
    return log_probs, entropies


def plain_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    vocab_size: int | None = None,
    entropy: Entropy = "none",
) -> tuple[Tensor, Tensor | None]:
    """The plain twin of `linear_log_prob`, for tests and benchmarks: whole logits, gradients by autograd, one rank.

    In bf16 it rounds the logits to bf16, as a linear layer does.
    """
    logits_NV = hidden @ weight[:vocab_size].t()
    log_softmax_NV = torch.log_softmax(logits_NV.to(wide_dtype(hidden.dtype)).div_(temperature), dim=-1)
    log_probs = log_softmax_NV.gather(1, labels[:, None]).squeeze(1)
    if entropy == "none":
        return log_probs, None
    entropies = -(log_softmax_NV.exp() * log_softmax_NV).sum(dim=1)
    return log_probs, entropies if entropy == "differentiable" else entropies.detach()


@dataclass(frozen=True)
class _Options:
    inverse_temperature: float
    vocab_start: int
    vocab_size: int
    tp_group: dist.ProcessGroup | None
    chunk_bytes: int
    entropy: Entropy
    accumulate_into_main_grad: bool

    def tiles(self, matmul: Matmul, hidden: Tensor, weight: Tensor, buffers: Buffers | None = None) -> Tiles:
        vocabulary = min(max(self.vocab_size - self.vocab_start, 0), weight.shape[0])
        return Tiles(matmul, hidden, weight, vocabulary=vocabulary, chunk_bytes=self.chunk_bytes, extra_buffers=buffers)


def _ranks(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: must be [N, h] and [V, h]")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)}: must be [N] as hidden is {tuple(hidden.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}: must be torch.int64")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, weight {weight.dtype}: must be the same")


def _check_options(options: _Options, weight: Tensor) -> None:
    vocab_rows = weight.shape[0] * _ranks(options.tp_group)
    if not 0 < options.vocab_size <= vocab_rows:
        raise ValueError(f"vocab_size={options.vocab_size}: must be from 1 to {vocab_rows}, the rows of all ranks")
    if not 0 <= options.vocab_start <= vocab_rows - weight.shape[0]:
        raise ValueError(
            f"vocab_start={options.vocab_start}: with {weight.shape[0]} rows here and {vocab_rows} in all, must be "
            f"from 0 to {vocab_rows - weight.shape[0]}"
        )
    smallest_chunk = CHUNK_BYTES_PER_HIDDEN * (weight.shape[1] + 1)
    if options.chunk_bytes < smallest_chunk:
        raise ValueError(
            f"chunk_bytes={options.chunk_bytes}: must be at least {smallest_chunk} for hidden size {weight.shape[1]}"
        )
    if options.entropy not in get_args(Entropy):
        raise ValueError(f"entropy={options.entropy!r}: must be one of {', '.join(get_args(Entropy))}")
    wants_gradient = torch.is_grad_enabled() and weight.requires_grad
    if options.accumulate_into_main_grad and wants_gradient and not hasattr(weight, "main_grad"):
        raise ValueError("accumulate_into_main_grad=True: weight has no main_grad, which Megatron's DDP would give it")


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        matmul = Matmul(hidden.dtype, hidden.device)
        tiles = options.tiles(matmul, hidden, weight)
        softmax = _SoftmaxSums(labels, matmul.result_dtype, options)
        with matmul.precision():
            for rows in tiles.row_blocks:
                hidden_Rh = tiles.hidden(rows)
                for columns in tiles.column_tiles:
                    softmax.add_tile(rows, columns, *tiles.logits(hidden_Rh, tiles.weight(columns)))
        softmax.add_ranks()

        entropies = None if options.entropy == "none" else softmax.entropies()
        if options.entropy == "detached":
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, labels, softmax.maximum, softmax.exp_sum, entropies)
        # A saved tensor may come back as a copy (offloading), without what Megatron has attached to the parameter.
        ctx.parameter, ctx.options = weight, options
        return softmax.log_probs(), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, maximum, exp_sum, entropies = ctx.saved_tensors
        options: _Options = ctx.options
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        into_main_grad = needs_weight and options.accumulate_into_main_grad
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight and not into_main_grad else None
        _add_gradients(
            hidden,
            weight,
            _LogitGradient(labels, maximum, exp_sum, entropies, grad_log_probs, grad_entropies, options),
            grad_hidden,
            ctx.parameter.main_grad if into_main_grad else grad_weight,
            options,
        )
        return grad_hidden, _gradient_placeholder(ctx.parameter) if into_main_grad else grad_weight, None, None


def _add_gradients(
    hidden: Tensor,
    weight: Tensor,
    logit_gradient: _LogitGradient,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    options: _Options,
) -> None:
    """Adds dlogits @ weight to `grad_hidden` and dlogits.T @ hidden to `grad_weight`. None is a gradient not wanted."""
    matmul = Matmul(hidden.dtype, hidden.device)
    wide = matmul.result_dtype
    buffers: Buffers = {}
    if grad_hidden is not None and grad_hidden.dtype != wide:
        buffers["grad_hidden"] = ("Rh", wide)
    if grad_weight is not None and grad_weight.dtype != wide:
        buffers["grad_weight"] = ("Ch", wide)
    if not matmul.adds_in_place:
        buffers |= {"dlogits": ("RC", matmul.factor_dtype), "product_Rh": ("Rh", wide), "product_Ch": ("Ch", wide)}
    tiles = options.tiles(matmul, hidden, weight, buffers)

    # A tile of grad_weight is complete after one block of rows. With several it must stay wide until the last of them.
    sum_Vh = grad_weight.to(wide) if grad_weight is not None and len(tiles.row_blocks) > 1 else grad_weight
    with matmul.precision():
        for rows in tiles.row_blocks:
            hidden_Rh = tiles.hidden(rows)
            with tiles.widened("grad_hidden", grad_hidden, rows) as sum_Rh:
                for columns in tiles.column_tiles:
                    weight_Ch = tiles.weight(columns)
                    gradient_RC = logit_gradient.of_tile(rows, columns, *tiles.logits(hidden_Rh, weight_Ch))
                    dlogits_RC = tiles.factor("dlogits", gradient_RC)
                    tiles.add_product("product_Rh", sum_Rh, dlogits_RC, weight_Ch)
                    with tiles.widened("grad_weight", sum_Vh, columns) as sum_Ch:
                        tiles.add_product("product_Ch", sum_Ch, dlogits_RC.t(), hidden_Rh)
    if grad_weight is not None and sum_Vh is not None and sum_Vh is not grad_weight:
        grad_weight.copy_(sum_Vh)


def _gradient_placeholder(weight: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that is in `weight.main_grad` already: the same as from Megatron's own linear.

    A weight under DistributedDataParallel has the flag `grad_added_to_main_grad`. Once it is set, DDP's backward hook
    drops the `.grad` that autograd has made, though it has to be there for the hook to run: any memory will do. A tied
    weight has `zero_out_wgrad` too. There `.grad` also holds the gradient of the embedding, and the hook does add it to
    main_grad: our part has to be zero (one zero, expanded, takes no memory).
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return weight.new_zeros(()).expand(weight.shape)
    return torch.empty_like(weight)


class _SoftmaxSums:
    """For every token m, s and t of the module docstring, and the logit of the label, over the logits seen so far."""

    def __init__(self, labels: Tensor, dtype: torch.dtype, options: _Options) -> None:
        zeros = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
        is_id = (labels >= 0) & (labels < options.vocab_size)
        # Finite, so that the first rescaling multiplies zeros by a number; halved, so that it cannot overflow.
        self.maximum = zeros + torch.finfo(dtype).min / 2
        self.exp_sum = zeros
        self.weighted_sum = zeros.clone()
        self.label_logit = torch.where(is_id, 0.0, torch.nan).to(dtype)
        self._labels, self._options = labels, options

    def add_tile(self, rows: slice, columns: slice, logits_RC: Tensor, exp_RC: Tensor) -> None:
        """Takes in a tile of logits, and overwrites both tiles."""
        inverse_temperature = self._options.inverse_temperature
        cell_R1, is_here_R = _label_cells(self._labels[rows], self._options.vocab_start, columns)
        label_logit_R = self.label_logit[rows]
        label_logit_R.copy_(torch.where(is_here_R, logits_RC.gather(1, cell_R1).squeeze(1), label_logit_R))

        self._raise_maximum(rows, torch.maximum(self.maximum[rows], logits_RC.amax(dim=1) * inverse_temperature))
        shifted_RC = torch.add(-self.maximum[rows, None], logits_RC, alpha=inverse_temperature, out=logits_RC)
        self.exp_sum[rows] += torch.exp(shifted_RC, out=exp_RC).sum(dim=1)
        if self._options.entropy != "none":
            self.weighted_sum[rows] += shifted_RC.mul_(exp_RC).sum(dim=1)

    def _raise_maximum(self, rows: slice, maximum: Tensor) -> None:
        below = self.maximum[rows] - maximum
        factor = below.exp()
        self.weighted_sum[rows] = factor * (self.weighted_sum[rows] + below * self.exp_sum[rows])
        self.exp_sum[rows] *= factor
        self.maximum[rows] = maximum

    def add_ranks(self) -> None:
        """The sums over the vocabulary of all tensor-parallel ranks: two collectives, none for a single rank."""
        group = self._options.tp_group
        if _ranks(group) == 1:
            return
        maximum = self.maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        self._raise_maximum(slice(None), maximum)
        sums = [self.exp_sum, self.label_logit]
        if self._options.entropy != "none":
            sums.append(self.weighted_sum)
        stacked = torch.stack(sums)
        dist.all_reduce(stacked, group=group)
        for own, summed in zip(sums, stacked, strict=True):
            own.copy_(summed)

    def log_probs(self) -> Tensor:
        # The same operation as in add_tile: a label that holds the maximum gets exactly the same shifted logit.
        shifted = torch.add(-self.maximum, self.label_logit, alpha=self._options.inverse_temperature)
        return shifted - self.exp_sum.log()

    def entropies(self) -> Tensor:
        return self.exp_sum.log() - self.weighted_sum / self.exp_sum


class _LogitGradient:
    """The gradient of the logits, tile by tile.

    With g and e the gradients of log_prob and entropy, and z_j = y_j - m = log p_j + log s, that of x_j is

        [j = label] g / temperature + exp(z_j) (constant + slope z_j)
        slope = -e / (s temperature),    constant = -(g + e (H - log s)) / (s temperature)
    """

    def __init__(
        self,
        labels: Tensor,
        maximum: Tensor,
        exp_sum: Tensor,
        entropies: Tensor | None,
        grad_log_probs: Tensor | None,
        grad_entropies: Tensor | None,
        options: _Options,
    ) -> None:
        grad = torch.zeros_like(exp_sum) if grad_log_probs is None else grad_log_probs
        scale = -options.inverse_temperature / exp_sum
        self.at_label = grad * options.inverse_temperature
        self.constant = scale * grad
        self.slope = None
        if grad_entropies is not None:
            assert entropies is not None
            self.slope = scale * grad_entropies
            self.constant += self.slope * (entropies - exp_sum.log())
        self._labels, self._maximum, self._options = labels, maximum, options

    def of_tile(self, rows: slice, columns: slice, logits_RC: Tensor, exp_RC: Tensor) -> Tensor:
        """The gradient of a tile of logits, in one of the two tiles: both are overwritten."""
        inverse_temperature = self._options.inverse_temperature
        z_RC = torch.add(-self._maximum[rows, None], logits_RC, alpha=inverse_temperature, out=logits_RC)
        gradient_RC = torch.exp(z_RC, out=exp_RC)
        if self.slope is None:
            gradient_RC *= self.constant[rows, None]
        else:
            gradient_RC *= torch.addcmul(self.constant[rows, None], self.slope[rows, None], z_RC, out=z_RC)
        cell_R1, is_here_R = _label_cells(self._labels[rows], self._options.vocab_start, columns)
        return gradient_RC.scatter_add_(1, cell_R1, torch.where(is_here_R, self.at_label[rows], 0.0)[:, None])


def _label_cells(labels_R: Tensor, vocab_start: int, columns: slice) -> tuple[Tensor, Tensor]:
    """The column of each row's label in a tile [R, 1], and whether the label is in the tile [R]; if not, any column."""
    column_R = labels_R - (vocab_start + columns.start)
    width = columns.stop - columns.start
    return column_R.clamp(0, width - 1)[:, None], (column_R >= 0) & (column_R < width)
