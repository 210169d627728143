"""The `megatron-flowrl` command. Every subcommand takes a recipe and `section.key=value` overrides."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from megatron_flowrl import __version__
from megatron_flowrl.cli import conversion, evaluation, planning, runs, serving, training
from megatron_flowrl.cli.parsers import TRAIN_SECTIONS
from megatron_flowrl.config import SharedUserError, UserError

_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": training.train,
    "sft": training.sft,
    "plan": planning.plan,
    "report": runs.report,
    "score": training.score,
    "convert": conversion.convert,
    "serve": serving.serve,
    "evaluate": evaluation.evaluate,
    "judge": evaluation.judge,
    "compare": evaluation.compare,
    "status": runs.status,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with status 2, and a message without traceback, where the user's input is at fault."""
    parser = argparse.ArgumentParser(
        prog="megatron-flowrl", description="Train a language model to sample answers in proportion to their reward."
    )
    parser.add_argument("--version", action="version", version=f"megatron-flowrl {__version__}")
    parser.add_argument(
        "command",
        choices=tuple(_COMMANDS),
        help="train: reinforcement learning; sft: supervised training; plan: what a run would take; report: runs as "
        "HTML; score: log-probs of given responses; convert: between Hugging Face and Megatron; serve: vLLM servers; "
        "evaluate: benchmarks; judge: how different answers are; compare: evaluations beside one another; "
        "status: how far a run is",
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


__all__ = ["TRAIN_SECTIONS", "main"]
