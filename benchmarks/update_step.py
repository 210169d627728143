"""Times the update step of a 100 M Qwen2 on this machine, beside transformers on the same sequences.

    python benchmarks/update_step.py > update_step.json    the table goes to stderr

A mini-batch of 4,096 ragged tokens, one process, all cores, fp32 and bf16. Both sides start from the same weights,
compute the log-prob of every response token, sum them by sequence, and take the gradient of a squared residual per
sequence. Before anything is timed, their losses, log-probs and gradient norms have to agree.

Ours is the training pass of the package: one packed micro-batch, gradients accumulated in fp32. Transformers runs in
the forms its users write (see `FORMS`), each with scaled_dot_product_attention and gradients in the dtype of the
weights; the fastest of them in a first round is the opponent. Then both take turns, so that a busy neighbour slows
both. A time includes emptying the gradients; the optimizer step (gradient clipping, AdamW) is timed apart. In bf16
ours updates fp32 main weights, transformers with torch's AdamW only the bf16 weights, which is less work.

MFU is the share of the matrix-product speed measured here, at the shape of the model's largest layer. The FLOPs are
the model's, 6 x parameters x tokens with causal attention and the head, for both sides: what a side pads or computes
twice counts as time lost.
"""

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import circumstances
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import SafetensorsSource
from megatron_flowrl.config import Config, check_config, load_config
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model, wrap_for_training
from megatron_flowrl.model.gpt import TokenLogProbs
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import current_platform
from megatron_flowrl.platform.distributed import World, destroy_process_groups, initialize_process_groups
from megatron_flowrl.training.optimizer import Optimizer
from megatron_flowrl.training.passes import forward_backward, local_batches

TOKENS = 4096
MODEL = Qwen2Config(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    sliding_window=None,
    use_sliding_window=False,
    use_cache=False,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative for the loss and the norm of the gradient, absolute for the mean difference of log-probs.
TOLERANCES = {"float32": (1e-4, 1e-3, 1e-5), "bfloat16": (2e-2, 5e-2, 2e-2)}


def ragged_sequences(total: int = TOKENS) -> list[TokenSequence]:
    """Prompts of 64-128 tokens, responses of 100-700, from a fixed seed; the last response fills up to `total`."""
    draw = random.Random(0)
    lengths: list[tuple[int, int]] = []
    left = total
    while left:
        prompt, response = draw.randint(64, 128), draw.randint(100, 700)
        if left - prompt - response < 64 + 100:  # too little would be left for another
            response = left - prompt
        lengths.append((prompt, response))
        left -= prompt + response

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(MODEL.vocab_size), k=count))

    return [TokenSequence(tokens(prompt), tokens(response)) for prompt, response in lengths]


def squared_residuals(log_prob_sums: Tensor, count: int) -> Tensor:
    """The part that sequences with these summed log-probs have in the mean over `count` sequences."""
    return ((0.001 * log_prob_sums + 0.3) ** 2).sum() / count


@dataclass
class Result:
    """What both sides must agree on."""

    loss: float
    log_probs: Tensor
    gradient_norm: float


class Ours:
    """The training pass and the optimizer of this package, set up as a run on one CPU process would."""

    def __init__(self, folder: Path, dtype: str, sequences: list[TokenSequence]) -> None:
        self.config = _config(folder, dtype)
        platform, architecture = current_platform(), read_architecture(folder)
        model = build_parallel_model(architecture, self.config, platform)
        load_weights(model, SafetensorsSource(folder, architecture))
        self.model = wrap_for_training(model, self.config)
        self.optimizer = Optimizer(self.model, self.config)
        packing = plan([len(s) for s in sequences], packing_rules(self.config, architecture, 1))
        self.batches = local_batches(sequences, packing, 0, platform.device)
        self.sequences = sequences

    def update(self, on_log_probs: Callable[[Tensor, PackedBatch], None] | None = None) -> Tensor:
        def loss(output: TokenLogProbs, batch: PackedBatch) -> Tensor:
            if on_log_probs is not None:
                on_log_probs(output.log_probs.detach(), batch)
            sums = torch.zeros(batch.num_sequences).index_add(0, batch.sequence_of_row, output.log_probs)
            return squared_residuals(sums, len(self.sequences))

        self.optimizer.zero_grad()
        return forward_backward(self.model.chunks, self.batches, self.config.log_prob, loss)

    def step(self) -> None:
        self.optimizer.step()

    def result(self) -> Result:
        of_sequence: dict[int, Tensor] = {}

        def keep(log_probs: Tensor, batch: PackedBatch) -> None:
            for number, index in enumerate(batch.sequences):
                of_sequence[index] = log_probs[batch.sequence_of_row == number]

        loss = self.update(keep).item()
        gradients = [p.main_grad for chunk in self.model.chunks for p in chunk.parameters()]
        log_probs = torch.cat([of_sequence[i] for i in range(len(self.sequences))])
        return Result(loss, log_probs, _norm(gradients))


class Transformers:
    """The same with transformers: `batches` of sequence numbers, each padded on the right to its longest."""

    def __init__(self, folder: Path, dtype: str, sequences: list[TokenSequence]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="sdpa")
        self.model.train()
        self.sequences = sequences
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-6, betas=(0.9, 0.999), weight_decay=0.1, fused=True
        )

    def update(self, form: "Form", on_log_probs: Callable[[int, Tensor], None] | None = None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for batch in form.batches(self.sequences):
            by_sequence = form.log_probs(self.model, [self.sequences[i] for i in batch])
            if on_log_probs is not None:
                for i, log_probs in zip(batch, by_sequence, strict=True):
                    on_log_probs(i, log_probs.detach())
            part = squared_residuals(torch.stack([log_probs.sum() for log_probs in by_sequence]), len(self.sequences))
            part.backward()
            loss += part.detach()
        return loss

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def result(self, form: "Form") -> Result:
        of_sequence: dict[int, Tensor] = {}
        loss = self.update(form, of_sequence.__setitem__).item()
        log_probs = torch.cat([of_sequence[i] for i in range(len(self.sequences))])
        return Result(loss, log_probs, _norm([p.grad for p in self.model.parameters()]))


@dataclass(frozen=True)
class Form:
    """A way to write the pass with transformers."""

    sequences_a_batch: int | None
    """None: all in one."""
    packed: bool = False
    """End to end in one row, told apart by position ids that start again; else padded, with an attention mask."""
    response_logits_only: bool = True

    def batches(self, sequences: list[TokenSequence]) -> list[list[int]]:
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        size = self.sequences_a_batch or len(sequences)
        return [order[i : i + size] for i in range(0, len(order), size)]

    def log_probs(self, model: torch.nn.Module, sequences: list[TokenSequence]) -> list[Tensor]:
        """fp32 log-probs of each sequence's response."""
        tokens = [torch.tensor([*s.prompt, *s.response]) for s in sequences]
        if self.packed:
            inputs = {
                "input_ids": torch.cat(tokens)[None],
                "position_ids": torch.cat([torch.arange(len(t)) for t in tokens])[None],
            }
            starts = [sum(map(len, sequences[:i])) for i in range(len(sequences))]
        else:
            inputs = {"input_ids": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)}
            if len(tokens) > 1:
                lengths = torch.tensor([len(t) for t in tokens])[:, None]
                inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths).long()
            starts = [i * inputs["input_ids"].shape[1] for i in range(len(sequences))]
        rows = torch.cat(
            [start + torch.arange(len(s.prompt) - 1, len(s) - 1) for start, s in zip(starts, sequences, strict=True)]
        )
        labels = torch.cat([t[len(s.prompt) :] for t, s in zip(tokens, sequences, strict=True)])
        if self.response_logits_only:
            hidden = model.model(**inputs).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1).index_select(0, rows))
        else:
            logits = model(**inputs).logits.flatten(0, 1).index_select(0, rows)
        # log_softmax and the choice of the label in one: faster than the two of them.
        log_probs = -F.cross_entropy(logits.float(), labels, reduction="none")
        return list(log_probs.split([len(s.response) for s in sequences]))


FORMS = {
    "padded batch": Form(None, response_logits_only=False),
    "padded batch, response logits": Form(None),
    "sorted batches of 2": Form(2),
    "sorted batches of 4": Form(4),
    "one at a time": Form(1),
    "packed, position ids": Form(None, packed=True),
}


@dataclass
class Timing:
    """Seconds of `what`, and what they come to."""

    dtype: str
    side: str
    what: str
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    """Of the fastest."""
    mfu: float | None = None

    def finish(self, flops: float | None, peak: float) -> "Timing":
        self.tokens_per_second = round(TOKENS / self.best, 1)
        self.mfu = None if flops is None else round(flops / self.best / peak, 4)
        return self

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure_dtype(dtype: str, folder: Path, sequences: list[TokenSequence], rounds: int) -> dict[str, object]:
    ours, theirs = Ours(folder, dtype, sequences), Transformers(folder, dtype, sequences)
    ours_result = ours.result()
    agreement, first_round = {}, {}
    for name, form in FORMS.items():
        agreement[name] = check_agreement(dtype, name, ours_result, theirs.result(form))
        first_round[name] = round(seconds_of(partial(theirs.update, form)), 3)
        print(f"{dtype}  transformers, {name:<30} {first_round[name]:.3f} s", file=sys.stderr)
    opponent = min(first_round, key=first_round.__getitem__)

    peaks = []
    timings = {
        (side, what): Timing(dtype, side, what)
        for what in ("forward + backward", "optimizer step")
        for side in ("ours", f"transformers, {opponent}")
    }
    calls = [ours.update, partial(theirs.update, FORMS[opponent]), ours.step, theirs.step]
    for _ in range(rounds):
        peaks.append(matmul_flops_per_second(DTYPES[dtype]))
        for call, timing in zip(calls, timings.values(), strict=True):
            timing.seconds.append(round(seconds_of(call), 4))
    peaks.append(matmul_flops_per_second(DTYPES[dtype]))
    flops = model_flops(sequences)
    finished = [
        timing.finish(flops if timing.what == "forward + backward" else None, max(peaks)) for timing in timings.values()
    ]
    for t in finished:
        print(
            f"{t.dtype:<9} {t.what:<19} {t.side:<44} {t.best:>7.3f} {t.median:>7.3f} {t.tokens_per_second:>9.0f} "
            f"{'' if t.mfu is None else format(t.mfu, '.1%'):>6}",
            file=sys.stderr,
        )
    speedups = {
        "best": round(finished[1].best / finished[0].best, 3),
        "median": round(finished[1].median / finished[0].median, 3),
    }
    print(f"{dtype:<9} ours is {speedups['best']} x (best), {speedups['median']} x (median)", file=sys.stderr)
    return {
        "dtype": dtype,
        "matmul_gflops": round(max(peaks) / 1e9, 1),
        "transformers_forms_seconds": first_round,
        "agreement": agreement,
        "forward_backward_speedup": speedups,
        "measurements": [asdict(t) | {"best": t.best, "median": t.median} for t in finished],
    }


def check_agreement(dtype: str, name: str, ours: Result, theirs: Result) -> dict[str, float]:
    """Assert that the other side computes what ours does, and return by how much they differ."""
    differences = {
        "loss_relative": abs(theirs.loss / ours.loss - 1),
        "gradient_norm_relative": abs(theirs.gradient_norm / ours.gradient_norm - 1),
        "log_probs_mean": float((theirs.log_probs - ours.log_probs).abs().mean()),
    }
    for (what, difference), allowed in zip(differences.items(), TOLERANCES[dtype], strict=True):
        assert difference <= allowed, f"{dtype}, {name}: {what} differs by {difference:.2e}, above {allowed:.0e}"
    return {what: float(f"{difference:.1e}") for what, difference in differences.items()}


def model_flops(sequences: list[TokenSequence]) -> float:
    """Of forward + backward: three times the forward products, attention causal, the head on response tokens only."""
    head_dim = MODEL.hidden_size // MODEL.num_attention_heads
    attention_weights = 2 * MODEL.hidden_size * head_dim * (MODEL.num_attention_heads + MODEL.num_key_value_heads)
    layer_weights = attention_weights + 3 * MODEL.hidden_size * MODEL.intermediate_size
    pairs = sum(len(s) * (len(s) + 1) / 2 for s in sequences)
    linear = 2 * layer_weights * MODEL.num_hidden_layers * sum(map(len, sequences))
    attention = 4 * MODEL.hidden_size * MODEL.num_hidden_layers * pairs
    head = 2 * MODEL.hidden_size * MODEL.vocab_size * sum(len(s.response) for s in sequences)
    return 3.0 * (linear + attention + head)


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """The best of a few products of the shape of a SwiGLU layer's first half, into a buffer that is there already."""
    a = torch.randn(TOKENS, MODEL.hidden_size).to(dtype)
    b = torch.randn(2 * MODEL.intermediate_size, MODEL.hidden_size).to(dtype).t()
    out = torch.mm(a, b)
    seconds = min(seconds_of(partial(torch.mm, a, b, out=out)) for _ in range(8))
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] / seconds


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32).save_pretrained(folder)


def _config(folder: Path, dtype: str) -> Config:
    settings = [f"model.path={folder}", f"precision.dtype={dtype}", f"data.tokens_per_micro_batch={TOKENS}"]
    config = load_config(None, settings)
    check_config(config)
    return config


def _norm(gradients: list[Tensor]) -> float:
    return float(torch.stack([gradient.float().norm() for gradient in gradients]).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each side (default: 7)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    head = circumstances(("torch", "megatron-core", "transformers"))
    sequences = ragged_sequences()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder)
        config = _config(folder, "float32")
        initialize_process_groups(World(), config.parallel, current_platform(), config.seed)
        try:
            for dtype in arguments.dtype or DTYPES:
                results.append(measure_dtype(dtype, folder, sequences, arguments.rounds))
        finally:
            destroy_process_groups()
    report = head | {
        "load_average_at_end": circumstances()["load_average"],
        "model": MODEL.to_diff_dict(),
        "tokens": TOKENS,
        "sequence_lengths": [[len(s.prompt), len(s.response)] for s in sequences],
        "model_tflops": round(model_flops(sequences) / 1e12, 4),
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
