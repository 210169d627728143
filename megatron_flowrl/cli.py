"""The `megatron-flowrl` command. Every subcommand takes a recipe and `section.key=value` overrides."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from megatron_flowrl import __version__
from megatron_flowrl.config import SharedUserError, UserError, format_help, load_config
from megatron_flowrl.observe.log import configure_logging

_SCORE = """Log-probs of the response tokens in a JSONL file, under any parallel layout.

  in:   {"prompt": [1, 2, 3], "response": [4, 5]} a line: token ids, or text, which needs a tokenizer
  out:  {"log_probs": [-1.2, -0.3], "log_prob": -1.5} a line, in the same order; with log_prob.entropy=true also
        "entropy": [...]

  megatron-flowrl score --model DIR --input in.jsonl --output out.jsonl precision.dtype=float32
  torchrun --nproc_per_node 2 -m megatron_flowrl score --model DIR --input in.jsonl --output out.jsonl \\
      parallel.tensor_model_parallel_size=2
"""


_SCORE_SECTIONS = ("seed", "model", "parallel", "precision", "data", "log_prob", "logging")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with status 2, and a message without traceback, where the user's input is at fault."""
    parser = argparse.ArgumentParser(
        prog="megatron-flowrl", description="Train a language model to sample answers in proportion to their reward."
    )
    parser.add_argument("--version", action="version", version=f"megatron-flowrl {__version__}")
    parser.add_argument("command", choices=tuple(_COMMANDS), help="score: log-probs of given responses")
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
        print("megatron-flowrl: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


def _print(error: UserError) -> None:
    print(f"megatron-flowrl: error: {error}", file=sys.stderr)


def _score(arguments: Sequence[str]) -> None:
    parser = _command_parser("score", _SCORE)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face model folder; short for model.path=DIR")
    parser.add_argument("--input", metavar="FILE", required=True, help="JSONL of prompts and responses")
    parser.add_argument("--output", metavar="FILE", required=True, help="JSONL to write")
    parser.epilog = "settings:\n\n" + format_help(_SCORE_SECTIONS)
    given = parser.parse_intermixed_args(arguments)
    overrides = [*given.overrides, *([f"model.path={json.dumps(given.model)}"] if given.model is not None else [])]
    from megatron_flowrl.platform.distributed import alike, read_world

    world = read_world()
    with alike():
        config = load_config(given.recipe, overrides, _SCORE_SECTIONS, "score")
    configure_logging(config.logging, world.rank)
    from megatron_flowrl.training.score import score  # Megatron, which talks while it loads, only now

    score(config, world, given.input, given.output)


def _command_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"megatron-flowrl {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, over the recipe's")
    parser.add_argument("--recipe", metavar="FILE", help="YAML file of settings")
    return parser


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"score": _score}
