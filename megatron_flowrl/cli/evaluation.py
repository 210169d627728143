"""`evaluate`, `judge` and `compare`: how good a model is, and how varied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_flowrl.cli.parsers import command_parser, plain_parser, settings

_EVALUATE = """Answers to a benchmark's problems, graded: Avg@n, pass@k, maj@n, with 95% intervals, as the paper has it.

  megatron-flowrl evaluate math500 --data math500=math500.jsonl --model Qwen2.5-7B --output out
  megatron-flowrl evaluate aime24 humaneval --model runs/math/checkpoints --output out rollout.servers=8
  megatron-flowrl evaluate gsm8k --server http://127.0.0.1:8000 --served-model name --output out
  megatron-flowrl evaluate own.jsonl --model Qwen2.5-7B --output out reward.grader=choice

Benchmarks: aime24, aime25, amc23, math500, minerva, olympiadbench, gsm8k, humaneval, humaneval+, livecodebench,
codeforces; without --data from the Hugging Face hub (pip install -e '.[hub]'). Rows of a file: {"problem", "answer"};
the other forms are in megatron_flowrl/evaluation/benchmarks.py. The same command goes on from what is in --output:

  NAME.jsonl     a line an answer: its text, grade, length
  summary.json   the numbers; settings.json: of what
  quality.png    Avg@n and pass@k; diversity.png
"""
_JUDGE = """How different the answers to a problem are, 1 to 5, by a model's judgement, as in the FlowRL paper.

  megatron-flowrl judge out/math500.jsonl --server http://127.0.0.1:8000 --served-model name

FILE is one that `evaluate` writes. What the judge says goes to FILE with .judged before its ending; the same command
goes on from there, and asks again where there was no score.
"""
_COMPARE = """Evaluations beside one another: a table in Markdown, quality.png and diversity.png.

  megatron-flowrl compare out/flowrl out/grpo --output out

What `judge` has said of an evaluation's answers is among its numbers.
"""
_JUDGE_SECTIONS = ("rollout", "generation", "logging")
_EVALUATE_SECTIONS = (
    "seed", "model", "parallel", "precision", "data", "rollout", "generation", "reward", "logging",
)  # fmt: skip


def evaluate(arguments: Sequence[str]) -> None:
    """Answers to benchmarks, and their numbers."""
    parser = command_parser("evaluate", _EVALUATE, _EVALUATE_SECTIONS)
    parser.add_argument("--data", metavar="NAME=FILE", action="append", default=[], help="a benchmark's problems")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of answers and numbers")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder or checkpoint; short for model.path=DIR")
    parser.add_argument("--server", metavar="URL", help="ask a server with OpenAI's chat completions instead")
    parser.add_argument("--served-model", metavar="NAME", help="its name for the model")
    parser.add_argument("--api-key-variable", metavar="NAME", help="environment variable that has the server's key")
    parser.add_argument("--no-chat", action="store_true", help="give a model of ours the text without a chat template")
    parser.add_argument("--n", type=int, default=16, help="answers to each problem (default: 16)")
    parser.add_argument("--temperature", type=float, default=0.6, help="default: 0.6")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: 0.95")
    parser.add_argument("--max-tokens", type=int, default=8192, help="longest answer (default: 8192)")
    parser.add_argument("--limit", type=int, help="problems of each benchmark, from the first")
    parser.add_argument("--since", metavar="DATE", help="problems from 2024-08-01 on, where they have a date")
    parser.add_argument("--until", metavar="DATE", help="problems before this date")
    parser.add_argument("--template", metavar="TEXT", help="around {problem}, for a file that is no benchmark")
    parser.add_argument("--contests", metavar="DIR", help="standings, for the CodeForces rating")
    given = parser.parse_intermixed_args(arguments)
    benchmarks, given.overrides = (
        [text for text in given.overrides if ("=" in text) == is_setting] for is_setting in (False, True)
    )
    config, world = settings("evaluate", given, _EVALUATE_SECTIONS, given.model)
    from megatron_flowrl.evaluation.command import evaluate_command

    evaluate_command(config, world, given, benchmarks)


def judge(arguments: Sequence[str]) -> None:
    """A model's judgement of how different answers are."""
    parser = command_parser("judge", _JUDGE, _JUDGE_SECTIONS, "FILE")
    parser.add_argument("--server", metavar="URL", required=True, help="a server with OpenAI's chat completions")
    parser.add_argument("--served-model", metavar="NAME", required=True, help="its name for the model")
    parser.add_argument("--api-key-variable", metavar="NAME", help="environment variable that has the server's key")
    given = parser.parse_intermixed_args(arguments)
    config, _ = settings("judge", given, _JUDGE_SECTIONS)
    from megatron_flowrl.evaluation.command import judge_command

    judge_command(config, given)


def compare(arguments: Sequence[str]) -> None:
    """Evaluations beside one another."""
    parser = plain_parser("compare", _COMPARE)
    parser.add_argument("evaluations", nargs="+", metavar="DIR", help="an --output of evaluate")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the pictures")
    given = parser.parse_args(arguments)
    from megatron_flowrl.evaluation.compare import compare

    print(compare([Path(folder) for folder in given.evaluations], Path(given.output)))
