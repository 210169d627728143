"""What FP8 does to log-probs, importance weights, the residual and its gradient: a table, JSON, and a picture.

    python benchmarks/fp8_drift.py --plot fp8_drift.png > fp8_drift.json    the table goes to stderr

FP8 is emulated here (ops/fp8_linear.py): its numbers are Transformer Engine's, its speed says nothing. The policy is
the demo's model after supervised training, the reference the same a hundred steps before, and the answers are of the
demo's task; all are made in --folder, unless they are there (--steps 600: two minutes on two cores; 3,300 is the demo's
own start). Everything is compared with the same in fp32, whose weights the others round to bf16.

    log-probs    of tokens: mean and largest difference
    weight       w = exp(sum of the answer's differences to bf16), as of answers that were sampled in bf16: mean,
                 largest, and the effective share of the answers, (sum w)^2 / (n sum w^2)
    on-policy    largest |w - 1| where the same model has sampled: exactly 0 unless a pass depends on the passes before
    residual     (log pi - log pi_ref) - beta r, log Z = 0, of an answer: root mean square of the difference, over that
                 of the residual itself; part of the noise of policy and reference is the same
    gradient     of the mean squared residual: cosine with that in fp32, and its norm by that norm
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from _report import circumstances
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the demo

from examples.countdown import commands
from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.config import Config, check_config, load_config
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.data.tokenizer import load_tokenizer
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model, freeze, wrap_for_training
from megatron_flowrl.model.gpt import TokenLogProbs
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import check_platform, current_platform
from megatron_flowrl.platform.distributed import World, process_groups
from megatron_flowrl.training.passes import forward_backward, forward_only, local_batches

BETA, SETTLED = 8.0, 3
PRECISIONS: dict[str, list[str]] = {
    "fp32": ["precision.dtype=float32"],
    "bf16": [],
    **{
        f"{recipe} {formats}": [f"precision.fp8={formats}", f"precision.fp8_recipe={recipe}"]
        for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")
        for formats in ("hybrid", "e4m3")
    },
    "tensorwise hybrid, ends bf16": [
        "precision.fp8=hybrid",
        "precision.fp8_recipe=tensorwise",
        "precision.first_last_layers_bf16=true",
    ],
}


@dataclass(frozen=True)
class Found:
    """In one precision, fp64: log_probs [tokens], before and in the update; residual [answers]; gradient [weights]."""

    log_probs: Tensor
    in_update: Tensor
    residual: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Drift:
    """A row of the table."""

    precision: str
    log_prob_mean: float
    log_prob_max: float
    weight_mean: float
    weight_max: float
    effective_share: float
    on_policy: float
    residual: float
    gradient_cosine: float
    gradient_norm: float


def made(folder: Path, steps: int) -> tuple[Path, Path]:
    """Checkpoints of the policy and the reference; what is missing is made."""
    data, start = folder / "data", folder / "warm_start"
    last = start / "checkpoints" / f"step_{steps:08d}"
    before = last.with_name(f"step_{steps - 100:08d}")
    if not (last.is_dir() and before.is_dir()):
        commands.prepare(data)
        settings = [f"run.steps={steps}", f"optimizer.lr_decay_iters={steps}", "evaluation.interval=1000000"]
        commands.warm_start(data, start, *settings, "checkpoint.save_interval=100")
    return last, before


def answers(folder: Path, count: int) -> list[TokenSequence]:
    """Of the supervised training's rows, the last, which end with the end-of-text token."""
    tokenizer = load_tokenizer(folder / "data" / "model")
    rows = [json.loads(line) for line in (folder / "data" / "sft.jsonl").read_text().splitlines()[-count:]]
    end = json.loads((folder / "data" / "model" / "config.json").read_text())["eos_token_id"]
    return [
        TokenSequence(tuple(tokenizer.encode(row["prompt"], True)), (*tokenizer.encode(row["response"], False), end))
        for row in rows
    ]


def measure(policy: Path, reference: Path, settings: list[str], sequences: list[TokenSequence]) -> Found:
    """Log-probs of both, then the gradient; scales that have a history have settled before."""
    config, earlier = (_config(path, settings) for path in (policy, reference))
    platform, architecture = current_platform(), read_architecture(locate_model(str(policy)).hugging_face)
    check_platform(config, platform)
    packing = plan([len(s) for s in sequences], packing_rules(config, architecture, 1))
    batches = local_batches(sequences, packing, 0, platform.device)
    rewards = torch.rand(len(sequences), generator=torch.Generator().manual_seed(3)).round()

    old = freeze(build_parallel_model(architecture, earlier, platform))
    load_weights(old, open_source(earlier, architecture))
    of_reference = torch.zeros(len(sequences))

    model = build_parallel_model(architecture, config, platform)
    load_weights(model, open_source(config, architecture))
    model = wrap_for_training(model, config)
    in_update: list[Tensor] = []

    def loss(output: TokenLogProbs, batch: PackedBatch) -> Tensor:
        in_update.append(output.log_probs.detach())
        sums = torch.zeros(batch.num_sequences).index_add(0, batch.sequence_of_row, output.log_probs)
        index = torch.tensor(batch.sequences)
        return (sums - of_reference[index] - BETA * rewards[index]).square().sum() / len(sequences)

    for _ in range(SETTLED):
        tokens = by_answer([output.log_probs for output in forward_only(old.chunks, batches, config.log_prob)], batches)
        of_reference.copy_(torch.stack([one.sum() for one in tokens]))
        outputs = forward_only(model.chunks, batches, config.log_prob)
        in_update.clear()
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        forward_backward(model.chunks, batches, config.log_prob, loss)
    gradient = torch.cat([p.main_grad.flatten().double() for chunk in model.chunks for p in chunk.parameters()])
    trained = by_answer(in_update, batches)
    residual = torch.stack([one.sum() for one in trained]) - of_reference - BETA * rewards
    before = by_answer([output.log_probs for output in outputs], batches)
    return Found(torch.cat(before).double(), torch.cat(trained).double(), residual.double(), gradient)


def by_answer(log_probs: list[Tensor], batches: list[PackedBatch]) -> list[Tensor]:
    """The log-probs of each answer, in the order in which answers were given."""
    found: dict[int, Tensor] = {}
    for values, batch in zip(log_probs, batches, strict=True):
        found |= {index: values[batch.sequence_of_row == number] for number, index in enumerate(batch.sequences)}
    return [found[index] for index in sorted(found)]


def drift(precision: str, found: Found, bf16: Found, fp32: Found, lengths: Tensor) -> Drift:
    """`lengths` int64 [answers]: tokens."""

    def weights(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in (one - other).split(lengths.tolist())]).exp()

    apart = (found.log_probs - fp32.log_probs).abs()
    weight = weights(found.log_probs, bf16.log_probs)
    return Drift(
        precision,
        apart.mean().item(),
        apart.max().item(),
        weight.mean().item(),
        weight.max().item(),
        (weight.sum() ** 2 / weight.square().sum() / len(weight)).item(),
        (weights(found.in_update, found.log_probs) - 1).abs().max().item(),
        ((found.residual - fp32.residual).square().mean() / fp32.residual.square().mean()).sqrt().item(),
        torch.nn.functional.cosine_similarity(found.gradient, fp32.gradient, dim=0).item(),
        (found.gradient.norm() / fp32.gradient.norm()).item(),
    )


def table(rows: list[Drift]) -> str:
    """Markdown."""
    lines = [
        "| precision | log-probs, mean / largest | weight, mean / largest | effective share | on-policy | residual | "
        "gradient, cosine / norm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.precision} | {row.log_prob_mean:.1e} / {row.log_prob_max:.1e} | {row.weight_mean:.3f} / "
            f"{row.weight_max:.2f} | {row.effective_share:.3f} | {row.on_policy:.2g} | {row.residual:.1e} | "
            f"{row.gradient_cosine:.4f} / {row.gradient_norm:.3f} |"
        )
    return "\n".join(lines)


def draw(found: dict[str, Found], lengths: Tensor, path: Path) -> None:
    """The spread of log-prob differences, and of log w, by precision."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [name for name in found if name != "fp32"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 0.42 * len(names) + 1.8), sharey=True)
    of_tokens = [(found[name].log_probs - found["fp32"].log_probs).abs().clamp(min=1e-7).numpy() for name in names]
    of_answers = [
        torch.stack(
            [p.sum() for p in (found[name].log_probs - found["bf16"].log_probs).split(lengths.tolist())]
        ).numpy()
        for name in names
    ]
    style = {"whis": (1, 99), "showfliers": False, "orientation": "horizontal", "widths": 0.65}
    left.boxplot(of_tokens, tick_labels=names, **style)
    right.boxplot(of_answers, tick_labels=names, **style)
    left.set(xscale="log", xlabel="|log-prob - log-prob in fp32| of a token", title="Tokens")
    right.set(xlabel="log w = sum over the answer of (log-prob - log-prob in bf16)", title="Answers sampled in bf16")
    right.axvline(0, color="0.7", zorder=0)
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("FP8, emulated: boxes hold half of the values, whiskers 98%")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _config(checkpoint: Path, settings: list[str]) -> Config:
    given = [f"model.path={checkpoint}", "data.tokens_per_micro_batch=4096", *settings]
    config = load_config(None, given, ("model", "precision", "data", "log_prob", "ddp"), "the benchmark")
    check_config(config)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="what was made by an earlier call, or is to be kept")
    parser.add_argument("--steps", type=int, default=600, help="of supervised training (default: 600)")
    parser.add_argument("--answers", type=int, default=400, help="default: 400")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    given = parser.parse_args()
    if given.steps < 200 or given.answers < 1:
        parser.error(f"--steps {given.steps} --answers {given.answers}: at least 200 steps and one answer")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).absolute()
        stdout, sys.stdout = sys.stdout, sys.stderr  # what the program's commands say
        policy, reference = made(folder, given.steps)
        sequences = answers(folder, given.answers)
        lengths = torch.tensor([len(sequence.response) for sequence in sequences])
        found: dict[str, Found] = {}
        with process_groups(World(), Config().parallel, current_platform(), 1):
            for name, settings in PRECISIONS.items():
                found[name] = measure(policy, reference, settings, sequences)
                print(f"{name} measured", file=sys.stderr)
        sys.stdout = stdout
    rows = [drift(name, one, found["bf16"], found["fp32"], lengths) for name, one in found.items()]
    assert all(math.isfinite(row.log_prob_mean) for row in rows)
    print(table(rows), file=sys.stderr)
    if given.plot is not None:
        draw(found, lengths, given.plot)
    answers_of = {"answers": len(sequences), "tokens": int(lengths.sum()), "steps": given.steps, "beta": BETA}
    print(
        json.dumps(
            {**circumstances(("torch", "megatron-core")), **answers_of, "drift": [asdict(r) for r in rows]}, indent=1
        )
    )


if __name__ == "__main__":
    main()
