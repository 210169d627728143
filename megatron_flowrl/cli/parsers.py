"""What the commands share: parsers, sections of settings, and the configuration that they give."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_flowrl.config import Config, format_help, load_config
from megatron_flowrl.observe.log import configure_logging

if TYPE_CHECKING:
    from megatron_flowrl.platform.distributed import World

TRAIN_SECTIONS = (
    "seed", "run", "model", "parallel", "ddp", "precision", "recompute", "optimizer", "objective", "flowrl", "log_z",
    "policy_gradient", "critic", "sampler_correction", "prompts", "reward", "data", "log_prob", "reference", "rollout",
    "generation", "evaluation", "checkpoint", "tracking", "logging",
)  # fmt: skip


def plain_parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Of a command, with its texts as they are."""
    return argparse.ArgumentParser(
        prog=f"megatron-flowrl {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def command_parser(
    name: str, description: str, sections: Sequence[str], *positionals: str, recipe_first: bool = False
) -> argparse.ArgumentParser:
    """Of a command that reads settings of `sections`; with `recipe_first` a recipe may stand among them."""
    parser = plain_parser(name, description, "settings:\n\n" + format_help(sections))
    for positional in positionals:
        parser.add_argument(positional)
    what = "a recipe, and settings over its own" if recipe_first else "settings, over the recipe's"
    metavar = "recipe.yaml | section.key=value" if recipe_first else "section.key=value"
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=what)
    parser.add_argument("--recipe", metavar="FILE", help="YAML file of settings")
    return parser


def run_settings(
    name: str, description: str, sections: Sequence[str], arguments: Sequence[str]
) -> tuple[Config, World]:
    """What a command that takes a recipe and settings alone is given."""
    parser = command_parser(name, description, sections, recipe_first=True)
    return settings(name, recipe_apart(parser, parser.parse_intermixed_args(arguments)), sections)


def recipe_apart(parser: argparse.ArgumentParser, given: argparse.Namespace) -> argparse.Namespace:
    """The recipe among the settings taken out of them; where there are several, the parser ends the program."""
    recipes = [text for text in given.overrides if "=" not in text]
    if len(recipes) > 1 or (recipes and given.recipe is not None):
        parser.error(f"one recipe is wanted, and {', '.join([*recipes, *filter(None, [given.recipe])])} were given")
    if recipes:
        given.recipe, given.overrides = recipes[0], [text for text in given.overrides if "=" in text]
    return given


def settings(
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
