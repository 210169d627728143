"""`plan`: what a run would take."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_flowrl.cli.parsers import TRAIN_SECTIONS, command_parser, recipe_apart, settings

_PLAN = """Will it fit, how long will it take: a run of `train`, planned without a GPU.

  megatron-flowrl plan recipe.yaml parallel.tensor_model_parallel_size=4 --gpus 32
  megatron-flowrl plan recipe.yaml --gpu H200 --response-tokens 4000 --json

Memory of a rank by kind, seconds of a step by phase, hours and cost of a run; then, if there are such, layouts that are
faster on the same GPUs, as settings. What `train` would refuse is refused. A model whose folder is not here is known by
its name, as Qwen/Qwen2.5-7B. The figures of machines can be replaced: --hardware, of the form of
megatron_flowrl/planning/hardware.yaml; README.md beside it says how they were found, and how good the results are.
"""


def plan(arguments: Sequence[str]) -> None:
    """Print the plan of a recipe."""
    parser = command_parser("plan", _PLAN, TRAIN_SECTIONS, recipe_first=True)
    parser.add_argument("--gpus", type=_positive, help="GPUs that train (default: as few nodes as the layout takes)")
    parser.add_argument("--gpu", metavar="NAME", default="H100", help="their kind, of hardware.yaml (default: H100)")
    parser.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--sampler-nodes", type=int, metavar="N", help="that serve vLLM and do not train (default: one, if any)"
    )
    parser.add_argument(
        "--prompt-tokens", type=_positive, metavar="N", help="of a prompt (default: an eighth of prompts.max_tokens)"
    )
    parser.add_argument(
        "--response-tokens", type=_positive, metavar="N",
        help="of an answer, on average (default: half of generation.max_tokens)",
    )  # fmt: skip
    parser.add_argument("--hardware", metavar="FILE", help="YAML that is laid over hardware.yaml")
    parser.add_argument("--json", action="store_true", help="for machines: bytes, seconds, dollars")
    given = recipe_apart(parser, parser.parse_intermixed_args(arguments))
    config, _ = settings("plan", given, TRAIN_SECTIONS)
    from megatron_flowrl.planning.plan import Options, make_plan
    from megatron_flowrl.planning.report import as_json, as_text

    options = Options(
        given.gpu,
        given.gpus,
        given.gpus_per_node,
        given.sampler_nodes,
        given.prompt_tokens,
        given.response_tokens,
        given.hardware,
    )
    found = make_plan(config, options)
    print(json.dumps(as_json(found), indent=1) if given.json else as_text(found))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
