"""The `megatron-flowrl` command. Every subcommand takes a recipe and `section.key=value` overrides."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flowrl import __version__
from megatron_flowrl.config import (
    Config,
    SharedUserError,
    UserError,
    check_config,
    format_help,
    given_keys,
    load_config,
)
from megatron_flowrl.observe.log import configure_logging

if TYPE_CHECKING:
    from megatron_flowrl.platform.distributed import World

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
_REPORT = """One HTML file, with everything in it, about one run or several beside one another.

  megatron-flowrl report runs/flowrl runs/grpo --output report.html
"""
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
_STATUS = """How far a run is: a line, and exit status 0 where it is finished, 75 where the same command would go on.

  megatron-flowrl status runs/one
"""
_UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h
_COMPARE = """Evaluations beside one another: a table in Markdown, quality.png and diversity.png.

  megatron-flowrl compare out/flowrl out/grpo --output out

What `judge` has said of an evaluation's answers is among its numbers.
"""
_JUDGE_SECTIONS = ("rollout", "generation", "logging")
_EVALUATE_SECTIONS = (
    "seed", "model", "parallel", "precision", "data", "rollout", "generation", "reward", "logging",
)  # fmt: skip
_CONVERT = """Between Hugging Face folders and checkpoints of this program.

  hf-to-megatron HF_DIR OUT_DIR   a checkpoint of step 0 in the new folder OUT_DIR; weights keep the dtype of the
                                  files, unless precision.dtype is given
  megatron-to-hf DIR OUT_DIR      the weights of a checkpoint (or of the latest in a run's folder) as a new
                                  Hugging Face folder, with configuration and tokenizer
  inspect DIR                     what a checkpoint or a Hugging Face folder holds; verifies checksums

Every rank reads and holds only its part, in any layout:

  megatron-flowrl convert hf-to-megatron models/Qwen2.5-7B checkpoints/start
  torchrun --nproc_per_node 4 -m megatron_flowrl convert megatron-to-hf runs/math/checkpoints out \\
      parallel.tensor_model_parallel_size=4
"""
_SERVE = """vLLM servers for a Hugging Face folder, until a signal to stop (Ctrl-C, SIGTERM).

When all are ready, a line {"urls": ["http://127.0.0.1:8000", ...]} is printed. Each writes to a log of its own. What
the servers have started ends with this command, however it ends.

  megatron-flowrl serve --model Qwen2.5-0.5B rollout.servers=2 rollout.dtype=float32
"""
_SERVE_SECTIONS = ("seed", "model", "rollout", "logging")

_CONVERT_SECTIONS = ("seed", "model", "parallel", "precision", "logging")
_EXPORT_SECTIONS = ("model", "parallel", "logging")
_INSPECT_SECTIONS = ("logging",)

_SFT_SECTIONS = (
    "seed", "run", "model", "parallel", "ddp", "precision", "recompute", "optimizer", "prompts", "data", "log_prob",
    "evaluation", "sft", "checkpoint", "tracking", "logging",
)  # fmt: skip
TRAIN_SECTIONS = (
    "seed", "run", "model", "parallel", "ddp", "precision", "recompute", "optimizer", "objective", "flowrl", "log_z",
    "policy_gradient", "critic", "sampler_correction", "prompts", "reward", "data", "log_prob", "reference", "rollout",
    "generation", "evaluation", "checkpoint", "tracking", "logging",
)  # fmt: skip
_SCORE_SECTIONS = ("seed", "model", "parallel", "precision", "data", "log_prob", "logging")
_COMPARE_SECTIONS = (*_SCORE_SECTIONS, "rollout", "generation")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with status 2, and a message without traceback, where the user's input is at fault."""
    parser = argparse.ArgumentParser(
        prog="megatron-flowrl", description="Train a language model to sample answers in proportion to their reward."
    )
    parser.add_argument("--version", action="version", version=f"megatron-flowrl {__version__}")
    parser.add_argument(
        "command",
        choices=tuple(_COMMANDS),
        help="train: reinforcement learning; sft: supervised training; report: runs as HTML; score: log-probs of given "
        "responses; convert: between Hugging Face and Megatron; serve: vLLM servers; evaluate: benchmarks; "
        "judge: how different answers are; compare: evaluations beside one another; status: how far a run is",
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments; see COMMAND --help")
    parsed = parser.parse_args(arguments)
    try:
        _COMMANDS[parsed.command](parsed.rest)
    except SharedUserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node
            _print(error)
        sys.exit(2)
    except UserError as error:
        _print(error)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = {"train": "the newest checkpoint", "sft": "the newest checkpoint"}
        kept |= dict.fromkeys(("evaluate", "judge"), "what is answered")
        goes_on = kept.get(parsed.command)
        what = f"the same command goes on from {goes_on}" if goes_on else "no file or folder was finished"
        print(f"megatron-flowrl: interrupted; {what}", file=sys.stderr)
        sys.exit(130)


def _print(error: UserError) -> None:
    print(f"megatron-flowrl: error: {error}", file=sys.stderr)


def _score(arguments: Sequence[str]) -> None:
    parser = _command_parser("score", _SCORE, _COMPARE_SECTIONS)
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
        config, world = _settings("score --compare-sampler", given, _COMPARE_SECTIONS, given.model)
        from megatron_flowrl.training.compare_sampler import compare_sampler

        compare_sampler(config, world, given.input, given.output, Path(given.server_logs or "logs"))
        return
    if given.server_logs is not None:
        parser.error("--server-logs is for --compare-sampler: without it no server is started; leave it out")
    config, world = _settings("score", given, _SCORE_SECTIONS, given.model)
    from megatron_flowrl.training.score import score  # Megatron, which talks while it loads, only now

    score(config, world, given.input, given.output)


def _train(arguments: Sequence[str]) -> None:
    config, world = _run_settings("train", _TRAIN, TRAIN_SECTIONS, arguments)
    from megatron_flowrl.training.loop import train

    train(config, world)


def _sft(arguments: Sequence[str]) -> None:
    config, world = _run_settings("sft", _SFT, _SFT_SECTIONS, arguments)
    from megatron_flowrl.training.sft import sft

    sft(config, world)


def _run_settings(
    name: str, description: str, sections: Sequence[str], arguments: Sequence[str]
) -> tuple[Config, World]:
    parser = _command_parser(name, description, sections, recipe_first=True)
    given = parser.parse_intermixed_args(arguments)
    recipes = [text for text in given.overrides if "=" not in text]
    if len(recipes) > 1 or (recipes and given.recipe is not None):
        parser.error(f"one recipe is wanted, and {', '.join([*recipes, *filter(None, [given.recipe])])} were given")
    if recipes:
        given.recipe, given.overrides = recipes[0], [text for text in given.overrides if "=" in text]
    return _settings(name, given, sections)


def _report(arguments: Sequence[str]) -> None:
    parser = _parser("report", _REPORT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the first run's folder")
    given = parser.parse_args(arguments)
    from megatron_flowrl.observe.report import write_report

    runs = [Path(run) for run in given.runs]
    output = Path(given.output) if given.output else runs[0] / "report.html"
    write_report(runs, output)
    print(output)


def _status(arguments: Sequence[str]) -> None:
    parser = _parser("status", _STATUS)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--saved", action="store_true", help="print the newest checkpoint's step alone")
    given = parser.parse_args(arguments)
    from megatron_flowrl.observe.status import status_of

    status = status_of(Path(given.run))
    print(status.saved if given.saved else status.line())
    if not status.finished:
        sys.exit(_UNFINISHED)


def _serve(arguments: Sequence[str]) -> None:
    parser = _command_parser("serve", _SERVE, _SERVE_SECTIONS)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder; short for model.path=DIR")
    parser.add_argument("--logs", metavar="DIR", default="logs", help="folder for the servers' logs (default: logs)")
    parser.add_argument(
        "--for-training", action="store_true",
        help="take the recipe and settings of `train`, and begin with random weights: the trainer sends its own",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    if given.for_training:
        recipes = [text for text in given.overrides if "=" not in text]
        given.overrides = [text for text in given.overrides if "=" in text]
        given.recipe = given.recipe or next(iter(recipes), None)
    sections = TRAIN_SECTIONS if given.for_training else _SERVE_SECTIONS
    config, _ = _settings("serve", given, sections, given.model)
    check_config(config)
    from megatron_flowrl.checkpoint.locate import locate_model
    from megatron_flowrl.rollout.serve import make_servers, servable, serve

    trained = given.for_training
    model = locate_model(config.model.path).hugging_face if trained else servable(config.model.path)
    servers = make_servers(config, model, Path(given.logs), random_weights=trained)
    serve(servers, config.rollout.max_restarts)


def _judge(arguments: Sequence[str]) -> None:
    parser = _command_parser("judge", _JUDGE, _JUDGE_SECTIONS, "FILE")
    parser.add_argument("--server", metavar="URL", required=True, help="a server with OpenAI's chat completions")
    parser.add_argument("--served-model", metavar="NAME", required=True, help="its name for the model")
    parser.add_argument("--api-key-variable", metavar="NAME", help="environment variable that has the server's key")
    given = parser.parse_intermixed_args(arguments)
    config, _ = _settings("judge", given, _JUDGE_SECTIONS)
    from megatron_flowrl.evaluation.command import judge_command

    judge_command(config, given)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = _command_parser("evaluate", _EVALUATE, _EVALUATE_SECTIONS)
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
    config, world = _settings("evaluate", given, _EVALUATE_SECTIONS, given.model)
    from megatron_flowrl.evaluation.command import evaluate_command

    evaluate_command(config, world, given, benchmarks)


def _compare(arguments: Sequence[str]) -> None:
    parser = _parser("compare", _COMPARE)
    parser.add_argument("evaluations", nargs="+", metavar="DIR", help="an --output of evaluate")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the pictures")
    given = parser.parse_args(arguments)
    from megatron_flowrl.evaluation.compare import compare

    print(compare([Path(folder) for folder in given.evaluations], Path(given.output)))


def _convert(arguments: Sequence[str]) -> None:
    parser = _parser("convert", _CONVERT)
    kinds = {"hf-to-megatron": _hf_to_megatron, "megatron-to-hf": _megatron_to_hf, "inspect": _inspect}
    parser.add_argument("kind", choices=tuple(kinds), help="see KIND --help")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    parsed = parser.parse_args(arguments)
    kinds[parsed.kind](parsed.rest)


def _hf_to_megatron(arguments: Sequence[str]) -> None:
    name = "convert hf-to-megatron"
    parser = _command_parser(name, "A Hugging Face folder as a checkpoint.", _CONVERT_SECTIONS, "HF_DIR", "OUT_DIR")
    given = parser.parse_intermixed_args(arguments)
    config, world = _settings(name, given, _CONVERT_SECTIONS, given.HF_DIR)
    from megatron_flowrl.checkpoint.convert import hugging_face_to_megatron

    dtype_given = "precision.dtype" in given_keys(given.recipe, given.overrides)
    hugging_face_to_megatron(config, world, Path(given.OUT_DIR), dtype_given=dtype_given)


def _megatron_to_hf(arguments: Sequence[str]) -> None:
    name = "convert megatron-to-hf"
    parser = _command_parser(
        name, "A checkpoint's weights as a Hugging Face folder.", _EXPORT_SECTIONS, "DIR", "OUT_DIR"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    parser.add_argument(
        "--max-shard-size", type=_bytes, default="5GB", metavar="SIZE",
        help="largest safetensors file, as 5GB or 200MB (default: 5GB)",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    config, world = _settings(name, given, _EXPORT_SECTIONS, given.DIR)
    from megatron_flowrl.checkpoint.convert import megatron_to_hugging_face

    output = Path(given.OUT_DIR)
    megatron_to_hugging_face(config, world, output, dtype=given.dtype, max_shard_bytes=given.max_shard_size)


def _inspect(arguments: Sequence[str]) -> None:
    name = "convert inspect"
    parser = _command_parser(name, "What a folder holds, and whether it is whole.", _INSPECT_SECTIONS, "DIR")
    given = parser.parse_intermixed_args(arguments)
    config, _ = _settings(name, given, _INSPECT_SECTIONS)
    from megatron_flowrl.checkpoint.inspect import inspect

    for line in inspect(Path(given.DIR), config):
        print(line)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0 such as 5GB or 200MB")
    return size


def _parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Of a command, with its texts as they are."""
    return argparse.ArgumentParser(
        prog=f"megatron-flowrl {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _command_parser(
    name: str, description: str, sections: Sequence[str], *positionals: str, recipe_first: bool = False
) -> argparse.ArgumentParser:
    parser = _parser(name, description, "settings:\n\n" + format_help(sections))
    for positional in positionals:
        parser.add_argument(positional)
    what = "a recipe, and settings over its own" if recipe_first else "settings, over the recipe's"
    metavar = "recipe.yaml | section.key=value" if recipe_first else "section.key=value"
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=what)
    parser.add_argument("--recipe", metavar="FILE", help="YAML file of settings")
    return parser


def _settings(
    name: str, given: argparse.Namespace, sections: Sequence[str], model: str | None = None
) -> tuple[Config, World]:
    """The configuration of a command, and this process's place among all; logging is set up."""
    from megatron_flowrl.platform.distributed import alike, read_world

    world = read_world()
    overrides = [*given.overrides, *([f"model.path={json.dumps(model)}"] if model is not None else [])]
    with alike():
        config = load_config(given.recipe, overrides, sections, name)
    configure_logging(config.logging, world.rank)
    return config, world


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "sft": _sft,
    "report": _report,
    "score": _score,
    "convert": _convert,
    "serve": _serve,
    "evaluate": _evaluate,
    "judge": _judge,
    "compare": _compare,
    "status": _status,
}
