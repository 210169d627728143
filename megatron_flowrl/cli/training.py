"""`train`, `sft` and `score`: what computes with a model of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_flowrl.cli.parsers import TRAIN_SECTIONS, command_parser, run_settings, settings

_TRAIN = """Train a policy: FlowRL, or a method it is compared with (objective.name).

  megatron-flowrl train recipe.yaml run.folder=runs/one
  torchrun --nproc_per_node 8 -m megatron_flowrl train recipe.yaml run.folder=runs/one \\
      parallel.tensor_model_parallel_size=2

The same command goes on from what is in run.folder:

  checkpoints/    one a save; `latest`, and `best` by evaluation
  rollouts/       every step's answers, written before they are used
  metrics.jsonl   a line a step; samples.jsonl: some answers; tensorboard/: the same, and histograms
  config.yaml     every setting; logs/: what the servers say
"""
_SFT = """Supervised training on given responses: a warm start.

  megatron-flowrl sft recipe.yaml run.folder=runs/start sft.path=responses.jsonl

Rows are {"prompt": text, messages or token ids, "response": text or token ids}; run.steps counts updates. Go on with
`megatron-flowrl train recipe.yaml model.path=runs/start/checkpoints`.
"""
_SCORE = """Log-probs of the response tokens in a JSONL file, under any parallel layout.

  in:   {"prompt": [1, 2, 3], "response": [4, 5]} a line: token ids, or text, which needs a tokenizer
  out:  {"log_probs": [-1.2, -0.3], "log_prob": -1.5} a line, in the same order; with log_prob.entropy=true also
        "entropy": [...]

  megatron-flowrl score --model DIR --input in.jsonl --output out.jsonl precision.dtype=float32
  torchrun --nproc_per_node 2 -m megatron_flowrl score --model DIR --input in.jsonl --output out.jsonl \\
      parallel.tensor_model_parallel_size=2

With --compare-sampler the responses are sampled, and it is reported how far the sampler's log-probs are from these.
Only then the sections rollout and generation are read.

  in:   {"prompt": [1, 2, 3]} a line; a response, if there is one, is ignored
  out:  {"prompt": [1, 2, 3], "response": [4, 5], "log_probs": [-1.2, -0.3], "sampler_log_probs": [-1.2, -0.3],
        "finish_reason": "stop", "weight_versions": [{"version": "0", "start": 0, "stop": 2}]} for each of generation.n
        answers to each prompt, in order; answers end with the model's eos_token_id

  megatron-flowrl score --compare-sampler --model DIR --input in.jsonl --output out.jsonl \\
      precision.dtype=float32 rollout.dtype=float32 generation.n=1 generation.max_tokens=256
"""
_SFT_SECTIONS = (
    "seed", "run", "model", "parallel", "ddp", "precision", "recompute", "optimizer", "prompts", "data", "log_prob",
    "evaluation", "sft", "checkpoint", "tracking", "logging",
)  # fmt: skip
_SCORE_SECTIONS = ("seed", "model", "parallel", "precision", "data", "log_prob", "logging")
_COMPARE_SECTIONS = (*_SCORE_SECTIONS, "rollout", "generation")


def train(arguments: Sequence[str]) -> None:
    """Reinforcement learning."""
    config, world = run_settings("train", _TRAIN, TRAIN_SECTIONS, arguments)
    from megatron_flowrl.training.loop import train

    train(config, world)


def sft(arguments: Sequence[str]) -> None:
    """Supervised training."""
    config, world = run_settings("sft", _SFT, _SFT_SECTIONS, arguments)
    from megatron_flowrl.training.sft import sft

    sft(config, world)


def score(arguments: Sequence[str]) -> None:
    """Log-probs of given responses, or of sampled ones."""
    parser = command_parser("score", _SCORE, _COMPARE_SECTIONS)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder or checkpoint; short for model.path=DIR")
    parser.add_argument("--input", metavar="FILE", required=True, help="JSONL of prompts and responses")
    parser.add_argument("--output", metavar="FILE", required=True, help="JSONL to write")
    parser.add_argument(
        "--compare-sampler", action="store_true",
        help="sample answers to the prompts from vLLM servers with the model's weights (responses in the input are "
        "ignored), score them, and report the mismatch",
    )  # fmt: skip
    # Not --logs: torchrun takes that for an abbreviation of two options of its own, wherever it stands.
    parser.add_argument(
        "--server-logs", metavar="DIR", help="with --compare-sampler: folder for the servers' logs (default: logs)"
    )
    given = parser.parse_intermixed_args(arguments)
    if given.compare_sampler:
        config, world = settings("score --compare-sampler", given, _COMPARE_SECTIONS, given.model)
        from megatron_flowrl.training.compare_sampler import compare_sampler

        compare_sampler(config, world, given.input, given.output, Path(given.server_logs or "logs"))
        return
    if given.server_logs is not None:
        parser.error("--server-logs is for --compare-sampler: without it no server is started; leave it out")
    config, world = settings("score", given, _SCORE_SECTIONS, given.model)
    from megatron_flowrl.training.score import score  # Megatron, which talks while it loads, only now

    score(config, world, given.input, given.output)
