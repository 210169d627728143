"""What the command line says, as an evaluation."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_flowrl.checkpoint.companions import stop_token_ids
from megatron_flowrl.checkpoint.locate import locate_model
from megatron_flowrl.config import Config, UserError, check_config
from megatron_flowrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_flowrl.evaluation.benchmarks import Part
from megatron_flowrl.evaluation.compare import draw
from megatron_flowrl.evaluation.evaluate import Plan, check_folder, check_plan, claim, evaluate, reward_of
from megatron_flowrl.evaluation.judge import judge
from megatron_flowrl.evaluation.results import SUMMARY, table
from megatron_flowrl.evaluation.sources import ChatServer, OwnServers
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.observe.log import configure_logging, logger
from megatron_flowrl.platform.distributed import World
from megatron_flowrl.rewards.find import make_grader
from megatron_flowrl.rollout.server import check_vllm

_LARGEST_SHARD = 5 * 10**9
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def evaluate_command(config: Config, world: World, given: argparse.Namespace, benchmarks: Sequence[str]) -> None:
    """Check all that can be checked, then evaluate, and print a table. Raises UserError."""
    if world.size > 1:
        raise UserError("evaluate is one process, whatever its servers are: start it without torchrun")
    plan = _plan(config, given, benchmarks)
    problems = check_plan(plan, config.reward)
    for benchmark in problems:
        make_grader(reward_of(config, benchmark))
    output = Path(given.output)
    check_folder(output, plan, config, problems)
    with _source(config, world, given, plan, output) as source:
        claim(output, plan, config, problems)
        summary = evaluate(config, plan, problems, source, output)
    print(table(summary))
    try:
        for picture in draw({plan.model: summary["benchmarks"]}, output):
            logger.info("%s is a picture of them", picture)
    except UserError as error:
        logger.warning("%s", error)
    logger.info("%s has all numbers", output / SUMMARY)


def judge_command(config: Config, given: argparse.Namespace) -> None:
    """Judge a file of answers, and print the numbers as JSON. Raises UserError."""
    file = Path(given.FILE)
    with _chat_server(config, given) as source:
        print(json.dumps(judge(file, source, given.served_model), indent=2))


def _plan(config: Config, given: argparse.Namespace, benchmarks: Sequence[str]) -> Plan:
    if not benchmarks:
        raise UserError("name a benchmark, such as math500, or a file of problems; evaluate --help has them")
    if (given.server is None) == (not config.model.path):
        raise UserError("give either --model or --server")
    if given.server is not None and given.served_model is None:
        raise UserError("--server needs --served-model: the name that it has for the model")
    data = dict(text.partition("=")[::2] for text in given.data)
    empty = [name for name, path in data.items() if not path]
    if empty:
        raise UserError(f"--data {empty[0]} is no NAME=FILE")
    good = {
        "--n": given.n >= 1,
        "--max-tokens": given.max_tokens >= 1,
        "--temperature": given.temperature >= 0,
        "--top-p": 0 < given.top_p <= 1,
        "--limit": given.limit is None or given.limit >= 1,
    }
    for option, is_good in good.items():
        if not is_good:
            value = getattr(given, option.removeprefix("--").replace("-", "_"))
            raise UserError(f"{option} {value} cannot be: numbers of things are 1 or more, 0 < top-p <= 1")
    model = given.served_model
    for option, date in (("--since", given.since), ("--until", given.until)):
        if date is not None and not _DATE.fullmatch(date):
            raise UserError(f"{option} {date} is no date such as 2024-08-01")
    if given.server is None:
        folder = locate_model(config.model.path)  # a run's newest checkpoint, whatever is saved meanwhile
        model = str((folder.checkpoint or folder.hugging_face).absolute())
    return Plan(
        benchmarks,
        data,
        model,
        not given.no_chat,
        given.n,
        given.temperature,
        given.top_p,
        given.max_tokens,
        Part(given.limit, given.since, given.until),
        given.template,
        given.contests,
    )


def _source(
    config: Config, world: World, given: argparse.Namespace, plan: Plan, output: Path
) -> ChatServer | OwnServers:
    if given.server is not None:
        return _chat_server(config, given)
    config = replace(config, model=replace(config.model, path=plan.model))
    folder = locate_model(plan.model)
    architecture = read_architecture(folder.hugging_face)
    longest = config.rollout.max_model_len or architecture.max_sequence_length
    if plan.max_tokens >= longest:
        raise UserError(
            f"--max-tokens {plan.max_tokens} leaves no room for a prompt: the model, or rollout.max_model_len, takes "
            f"{longest} tokens; lower it"
        )
    tokenizer = load_tokenizer(config.data.tokenizer or folder.hugging_face)
    if not config.generation.urls:
        check_vllm()
    model = folder.hugging_face
    if folder.checkpoint is not None and not config.generation.urls:
        model = _exported(config, world, folder.checkpoint, output)
    stop = stop_token_ids(folder.hugging_face)
    return OwnServers(config, model, output / "logs", tokenizer, stop, chat=_has_chat(tokenizer) and not given.no_chat)


def _chat_server(config: Config, given: argparse.Namespace) -> ChatServer:
    key = None
    if given.api_key_variable is not None:
        key = os.environ.get(given.api_key_variable)
        if not key:
            raise UserError(f"the environment has no {given.api_key_variable}, which --api-key-variable names")
    return ChatServer(config, given.server, given.served_model, key)


def _exported(config: Config, world: World, checkpoint: Path, output: Path) -> Path:
    """A checkpoint as a Hugging Face folder, which is what vLLM reads."""
    folder = output / "hugging_face" / checkpoint.name
    if not folder.exists():
        check_config(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In a process of its own, which gives back what memory of a device the weights took: the servers need it.
        start: Any = {"initializer": configure_logging, "initargs": (config.logging, world.rank)}
        with ProcessPoolExecutor(1, get_context("spawn"), **start) as process:
            process.submit(_export, config, world, folder).result()
    return folder


def _export(config: Config, world: World, folder: Path) -> None:
    from megatron_flowrl.checkpoint.convert import megatron_to_hugging_face

    megatron_to_hugging_face(config, world, folder, dtype=config.rollout.dtype, max_shard_bytes=_LARGEST_SHARD)


def _has_chat(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.chat([{"role": "user", "content": "x"}])
    except UserError:
        return False
    return True


__all__ = ["evaluate_command", "judge_command"]
