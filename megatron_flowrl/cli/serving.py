"""`serve`: vLLM servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_flowrl.cli.parsers import TRAIN_SECTIONS, command_parser, recipe_apart, settings
from megatron_flowrl.config import check_config

_SERVE = """vLLM servers for a Hugging Face folder, until a signal to stop (Ctrl-C, SIGTERM).

When all are ready, a line {"urls": ["http://127.0.0.1:8000", ...]} is printed. Each writes to a log of its own. What
the servers have started ends with this command, however it ends.

  megatron-flowrl serve --model Qwen2.5-0.5B rollout.servers=2 rollout.dtype=float32
"""
_SERVE_SECTIONS = ("seed", "model", "rollout", "logging")


def serve(arguments: Sequence[str]) -> None:
    """Run vLLM servers until a signal to stop."""
    parser = command_parser("serve", _SERVE, _SERVE_SECTIONS)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder; short for model.path=DIR")
    parser.add_argument("--logs", metavar="DIR", default="logs", help="folder for the servers' logs (default: logs)")
    parser.add_argument(
        "--for-training", action="store_true",
        help="take the recipe and settings of `train`, and begin with random weights: the trainer sends its own",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    if given.for_training:
        given = recipe_apart(parser, given)
    sections = TRAIN_SECTIONS if given.for_training else _SERVE_SECTIONS
    config, _ = settings("serve", given, sections, given.model)
    check_config(config)
    from megatron_flowrl.checkpoint.locate import locate_model
    from megatron_flowrl.rollout.health import hang_seconds_of
    from megatron_flowrl.rollout.serve import make_servers, servable, serve
    from megatron_flowrl.rollout.server import visible_gpus

    trained = given.for_training
    model = locate_model(config.model.path).hugging_face if trained else servable(config.model.path)
    servers = make_servers(config, model, Path(given.logs), random_weights=trained)
    serve(servers, config.rollout.max_restarts, hang_seconds_of(config.rollout.hang_seconds, visible_gpus()))
