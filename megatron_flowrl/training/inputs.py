"""Everything that a training run is given, read and checked before a model is built or a server started."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from megatron_flowrl.checkpoint.companions import stop_token_ids
from megatron_flowrl.checkpoint.sources import WeightSource, open_source
from megatron_flowrl.config import Config, EvaluationConfig, PromptsConfig, UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.order import PromptOrder, derived_seed
from megatron_flowrl.data.prompts import Limits, PromptSet, ResponseSet, load_prompts, load_responses
from megatron_flowrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_flowrl.model.architecture import Architecture, read_architecture
from megatron_flowrl.model.layout import check_layout, max_sequence_length
from megatron_flowrl.model.objective import build_objective
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.objectives.batch import Objective
from megatron_flowrl.observe.log import logger
from megatron_flowrl.platform.distributed import check_agreement, together
from megatron_flowrl.rewards.find import check_ground_truth, make_grader
from megatron_flowrl.rollout.serve import make_servers
from megatron_flowrl.rollout.server import check_vllm
from megatron_flowrl.training.session import Session


@dataclass(frozen=True)
class Inputs:
    """What `read_inputs` has found to be good. `prompts` is None where rollouts are replayed."""

    architecture: Architecture
    source: WeightSource
    objective: Objective
    prompts: PromptSet | None
    held_out: PromptSet | None
    stop_token_ids: tuple[int, ...]
    tokenizer: Callable[[], Tokenizer]


@dataclass(frozen=True)
class Responses:
    """What `read_responses` has found to be good."""

    architecture: Architecture
    source: WeightSource
    training: Sequence[TokenSequence]
    validation: Sequence[TokenSequence]


def read_inputs(session: Session, logs: Path) -> Inputs:
    """Read and check all of it; every rank raises SharedUserError where one rank finds something wrong."""
    config = session.config
    tokenizer = cache(lambda: load_tokenizer(session.tokenizer))
    with together():
        architecture = read_architecture(session.folder.hugging_face)
        check_layout(architecture, config)
        objective = build_objective(config)
        stop = stop_token_ids(session.folder.hugging_face)
        prompts = held_out = None
        if config.rollout.replay is None:
            held = config.evaluation
            prompts = _read("prompts.path", config.prompts.path, config.prompts, session, architecture, tokenizer)
            if held.path is not None:
                held_out = _read("evaluation.path", held.path, held, session, architecture, tokenizer)
            if session.world.rank == 0:
                _check_sampling(session, architecture, prompts, held_out, logs)
        else:
            _check_replay(config, Path(config.rollout.replay))
        source = open_source(config, architecture)
    _agree(session, architecture, {"prompts.path": prompts, "evaluation.path": held_out})
    return Inputs(architecture, source, objective, prompts, held_out, stop, tokenizer)


def _check_replay(config: Config, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"rollout.replay = {str(folder)!r} is no folder; give RUN/rollouts of a run")
    if config.evaluation.path is not None:
        logger.info("no evaluation: a run on recorded rollouts (rollout.replay) has no sampler")


def read_responses(session: Session) -> Responses:
    """The same of supervised training: the rows of sft.path, some of which are kept for validation."""
    config = session.config
    with together():
        architecture = read_architecture(session.folder.hugging_face)
        check_layout(architecture, config)
        limits = _limits(config, architecture)
        found = load_responses(
            config.prompts,
            setting="sft.path",
            path=config.sft.path,
            split=config.sft.split,
            response_column=config.sft.response_column,
            tokenizer=lambda: load_tokenizer(session.tokenizer),
            limits=limits,
            stop_token_ids=stop_token_ids(session.folder.hugging_face),
        )
        plan([max(map(len, found.sequences))], packing_rules(config, architecture, session.replicas))
        order = PromptOrder(len(found.sequences), derived_seed(config.seed, 1), shuffle=True)
        rows = [found.sequences[number] for number in order.take(0, len(found.sequences))]
        held = math.ceil(config.sft.validation_share * len(rows))
        if len(rows) - held < config.sft.sequences_per_step:
            raise UserError(
                f"sft.sequences_per_step = {config.sft.sequences_per_step}, and sft.path has {len(rows)} rows, of "
                f"which {held} are for validation (sft.validation_share); lower it, or give more rows"
            )
        source = open_source(config, architecture)
    _agree(session, architecture, {"sft.path": found})
    return Responses(architecture, source, rows[held:], rows[:held])


def _agree(session: Session, architecture: Architecture, found: Mapping[str, PromptSet | ResponseSet | None]) -> None:
    """All ranks have read the same; and what it was is said."""
    check_agreement("the checkpoint that model.path leads to", session.config.model.path)
    check_agreement(f"{session.folder.hugging_face}/config.json", architecture)
    for name, some in found.items():
        check_agreement(name, some and some.fingerprint)
        if some is None:
            continue
        count = len(some.prompts if isinstance(some, PromptSet) else some.sequences)
        dropped = f"; {some.dropped} that were too long were left out" if some.dropped else ""
        logger.info("%s: %d rows of %s%s", name, count, some.source, dropped)


def _limits(config: Config, architecture: Architecture) -> Limits:
    return Limits(architecture.vocab_size, max_sequence_length(architecture, config))


def _read(
    setting: str,
    path: str,
    rows: PromptsConfig | EvaluationConfig,
    session: Session,
    architecture: Architecture,
    tokenizer: Callable[[], Tokenizer],
) -> PromptSet:
    config = session.config
    limits, most = _limits(config, architecture), config.rollout.max_model_len
    if most is not None and most < limits.max_length:
        limits = replace(limits, max_length=most, of="rollout.max_model_len")
    own = config.evaluation.max_tokens if isinstance(rows, EvaluationConfig) else None
    return load_prompts(
        config.prompts,
        setting=setting,
        path=path,
        split=rows.split,
        limit=rows.limit,
        tokenizer=tokenizer,
        limits=limits,
        max_answer_tokens=own or config.generation.max_tokens,
        answer_setting="evaluation.max_tokens" if own else "generation.max_tokens",
        check=partial(check_ground_truth, config.reward.grader),
    )


def _check_sampling(
    session: Session, architecture: Architecture, prompts: PromptSet, held_out: PromptSet | None, logs: Path
) -> None:
    """What would else be found after the model was read, or when the first answer is graded."""
    config = session.config
    make_grader(config.reward)
    if len(prompts.prompts) < config.run.prompts_per_step:
        raise UserError(
            f"run.prompts_per_step = {config.run.prompts_per_step}, and prompts.path has {len(prompts.prompts)}: "
            "every step would have prompts twice; lower it, or give more prompts"
        )
    longest = max(len(prompt.tokens) for prompt in prompts.prompts)
    plan([longest + config.generation.max_tokens], packing_rules(config, architecture, session.replicas))
    if not config.generation.urls:
        make_servers(config, session.folder.hugging_face, logs)
        check_vllm()


__all__ = ["Inputs", "Responses", "read_inputs", "read_responses"]
