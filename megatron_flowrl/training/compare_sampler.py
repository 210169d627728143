"""`megatron-flowrl score --compare-sampler`: how far the vLLM servers' log-probs are from the trainer's.

The servers get the trainer's weights and sample answers; the trainer scores exactly those tokens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_flowrl.checkpoint.companions import stop_token_ids
from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.jsonl import read_prompts, refuse_lines
from megatron_flowrl.data.tokenizer import load_tokenizer
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.model.layout import max_sequence_length
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.objectives.mismatch import Mismatch, mismatch, worst_token
from megatron_flowrl.observe.log import logger, progress
from megatron_flowrl.platform.distributed import World, alike, together
from megatron_flowrl.rollout.generation import Answer, Sampling
from megatron_flowrl.rollout.sampler import Sampler
from megatron_flowrl.rollout.serve import make_servers
from megatron_flowrl.rollout.server import check_vllm
from megatron_flowrl.rollout.transfer.base import shared
from megatron_flowrl.training.passes import ScoredTokens
from megatron_flowrl.training.score import (
    check_inputs,
    finite_or_null,
    load_frozen,
    score_sequences,
    whole_file,
)
from megatron_flowrl.training.session import Session, prepared

_VERSION = "0"  # the name of the only weights there are
_LEAST_TEMPERATURE = 0.01  # vLLM samples at this instead of at a lower one, and says so in its log only

Prompt = tuple[int, ...]


def compare_sampler(config: Config, world: World, input_path: str, output_path: str, logs: Path) -> None:
    """Sample `generation.n` answers to every prompt of `input_path` (JSONL), score them, and report the mismatch.

    A line out for each answer, prompt by prompt: {"prompt": token ids, "response": token ids, "log_probs": the
    trainer's, "sampler_log_probs": [...], "finish_reason": "stop" or "length", "weight_versions": [{"version", "start",
    "stop"}]}, with log_prob.entropy also "entropy". A number that is not finite is null. Servers write their logs into
    the folder `logs`. Everything the user gave is checked before the model is built and a server starts; the output
    appears whole or not at all. Raises UserError.
    """
    with prepared(config, world) as session:

        def read(architecture: Architecture) -> tuple[list[Prompt], tuple[int, ...]]:
            _check_settings(session.config, architecture)
            prompts = read_prompts(
                input_path, vocab_size=architecture.vocab_size, encode=lambda: load_tokenizer(session.tokenizer).encode
            )
            _check_lengths(prompts, input_path, session.config, architecture)
            stop = stop_token_ids(session.folder.hugging_face)
            if world.rank == 0:
                _check_servers(session, logs)
            return prompts, stop

        checked = check_inputs(session, input_path, output_path, read)
        prompts, stop = checked.content
        with alike():
            rules = packing_rules(session.config, checked.architecture, session.replicas)
            longest = session.config.generation.max_tokens
            plan([len(prompt) + longest for prompt in prompts], rules)
        logger.info("%s, %d prompts", session.layout(), len(prompts))

        model = load_frozen(session, checked)
        answers = _sample(model, prompts, stop, session, logs)
        sequences = shared([TokenSequence(prompts[answer.prompt_index], answer.token_ids) for answer in answers])
        with alike():
            packing = plan([len(sequence) for sequence in sequences], rules)
        logger.info(packing.describe())
        scored = score_sequences(model, sequences, packing, session)
        with together():
            if world.rank == 0:
                _report(scored, answers)
                _write(scored, sequences, answers, output_path)
                logger.info("%d answers written to %s", len(answers), output_path)


def _check_settings(config: Config, architecture: Architecture) -> None:
    problems = []
    temperature, limit = config.log_prob.temperature, _longest(config, architecture)
    if temperature < _LEAST_TEMPERATURE:
        problems.append(
            f"log_prob.temperature = {temperature} is below {_LEAST_TEMPERATURE}, the least that vLLM samples at; "
            "raise it"
        )
    if config.generation.max_tokens >= limit:
        problems.append(
            f"generation.max_tokens = {config.generation.max_tokens} leaves no room for a prompt: a sequence has at "
            f"most {limit} tokens ({_limits(config, architecture)}); lower it"
        )
    if problems:
        raise UserError(*problems)


def _check_lengths(prompts: Sequence[Prompt], path: str, config: Config, architecture: Architecture) -> None:
    limit, answer = _longest(config, architecture), config.generation.max_tokens
    problems = [
        (
            number,
            f"prompt of {len(prompt)} tokens + generation.max_tokens = {answer} is {len(prompt) + answer}; a sequence "
            f"has at most {limit} tokens ({_limits(config, architecture)}): lower generation.max_tokens, or leave the "
            "line out",
        )
        for number, prompt in enumerate(prompts, start=1)
        if len(prompt) + answer > limit
    ]
    refuse_lines(path, problems)


def _longest(config: Config, architecture: Architecture) -> int:
    ours, theirs = max_sequence_length(architecture, config), config.rollout.max_model_len
    return ours if theirs is None else min(ours, theirs)


def _limits(config: Config, architecture: Architecture) -> str:
    """What sets the limit."""
    theirs = config.rollout.max_model_len
    if theirs is not None and theirs <= max_sequence_length(architecture, config):
        return f"rollout.max_model_len = {theirs}"
    if config.model.max_sequence_length is not None:
        return f"model.max_sequence_length = {config.model.max_sequence_length}"
    return "the model's position limit or sliding window"


def _check_servers(session: Session, logs: Path) -> None:
    """What would be found only when the servers start, which is after the model was read."""
    if session.config.generation.urls:
        return
    make_servers(session.config, session.folder.hugging_face, logs)
    there = next(path for path in (logs.absolute(), *logs.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is not a folder"
        raise UserError(f"--server-logs {str(logs)!r}: {str(there)!r} {what}; give another folder")
    check_vllm()


def _sample(
    model: ParallelModel, prompts: Sequence[Prompt], stop: tuple[int, ...], session: Session, logs: Path
) -> list[Answer]:
    """The answers, prompt by prompt, on rank 0; an empty list on the others."""
    config, n = session.config, session.config.generation.n
    sampling = Sampling(
        max_tokens=config.generation.max_tokens,
        temperature=config.log_prob.temperature,
        stop_token_ids=stop,
        seed=config.seed if config.generation.seeded else None,
    )
    with Sampler(config, session.world, model, session.folder.hugging_face, logs) as sampler:
        sampler.start()
        started = time.perf_counter()
        sent = sampler.sync(_VERSION)
        logger.info("sent %.1f MB of weights in %.1f s", sent.nbytes / 1e6, time.perf_counter() - started)
        started = time.perf_counter()
        with progress(config.logging, session.world.rank, len(prompts) * n, "sampling") as advance:
            answers = sampler.generate(prompts, sampling, n, lambda _: advance())
        seconds, tokens = time.perf_counter() - started, sum(len(answer.token_ids) for answer in answers)
        logger.info(
            "sampled %d answers, %d tokens in %.1f s (%.0f tokens/s)", len(answers), tokens, seconds, tokens / seconds
        )
    return answers


def _report(scored: ScoredTokens, answers: Sequence[Answer]) -> None:
    sampler = torch.tensor([value for answer in answers for value in answer.log_probs], dtype=torch.float32)
    trainer = scored.log_probs.cpu()
    for line in describe(mismatch(trainer, sampler, scored.offsets)):
        logger.info(line)
    worst = worst_token(trainer, sampler)
    if worst is None:
        return
    number = next(i for i in range(len(answers)) if worst < scored.offsets[i + 1])
    answer, place = answers[number], worst - scored.offsets[number]
    logger.info(
        "worst token: prompt %d, answer %d, position %d of %d, token %d: log-prob %.6f by the trainer, %.6f by the "
        "sampler", answer.prompt_index + 1, answer.sample_index + 1, place + 1, len(answer.token_ids),
        answer.token_ids[place], trainer[worst].item(), sampler[worst].item(),
    )  # fmt: skip


def describe(found: Mismatch) -> list[str]:
    """The mismatch in lines for people."""
    lines = [
        f"mismatch over {found.tokens} tokens of {found.sequences} answers, trainer against sampler:",
        f"  |difference| of log-probs: mean {found.mean_abs_diff:.3e}, max {found.max_abs_diff:.3e}",
        f"  KL(sampler || trainer) per token: k1 {found.kl_k1:+.3e}, k3 {found.kl_k3:.3e}",
        f"  probability ratio of an answer, trainer / sampler: mean {found.sequence_ratio_mean:.6f}, "
        f"min {found.sequence_ratio_min:.6f}, max {found.sequence_ratio_max:.6f}",
    ]
    if found.clamped_tokens or found.clamped_sequences:
        lines.append(
            f"  log ratios clamped to [-20, 20]: of {found.clamped_tokens} tokens, of {found.clamped_sequences} answers"
        )
    if found.nonfinite_tokens:
        lines.append(
            f"  log-probs that are not finite, left out: {found.nonfinite_tokens} tokens, in "
            f"{found.nonfinite_sequences} answers"
        )
    return lines


def _write(
    scored: ScoredTokens, sequences: Sequence[TokenSequence], answers: Sequence[Answer], output_path: str
) -> None:
    with whole_file(Path(output_path)) as file:
        for index, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
            log_probs, entropy = scored.of_sequence(index)
            record: dict[str, object] = {
                "prompt": sequence.prompt,
                "response": answer.token_ids,
                "log_probs": finite_or_null(log_probs.tolist()),
                "sampler_log_probs": answer.log_probs,
                "finish_reason": answer.finish_reason,
                "weight_versions": [asdict(span) for span in answer.weight_versions],
            }
            if entropy is not None:
                record["entropy"] = finite_or_null(entropy.tolist())
            file.write(json.dumps(record) + "\n")
