"""Prompts to be answered, and prompts with their responses, from rows of data as `prompts` says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_flowrl.config import PromptsConfig, UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.jsonl import TokenReader
from megatron_flowrl.data.rows import BadRow, Row, read_rows, rows_of, short, value_of
from megatron_flowrl.data.tokenizer import Tokenizer

_GROUND_TRUTH = ("reward_model.ground_truth", "ground_truth", "answer")
Check = Callable[[Any, Row], "str | None"]  # (ground truth, row) -> what a grader could not work with


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what the grader is given with it: the text, the ground truth and the row with all its columns."""

    tokens: tuple[int, ...]
    text: str
    ground_truth: Any
    row: Row


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set, in its order, without those that were too long."""

    prompts: tuple[Prompt, ...]
    dropped: int
    source: str
    fingerprint: str
    """The same where tokens, ground truths and rows are."""


@dataclass(frozen=True)
class ResponseSet:
    """Prompts with responses, in their order, without those that were too long."""

    sequences: tuple[TokenSequence, ...]
    dropped: int
    source: str
    fingerprint: str


@dataclass(frozen=True)
class Limits:
    """Ids below `vocab_size`, sequences of `max_length` tokens; `of` is what takes no longer ones."""

    vocab_size: int
    max_length: int
    of: str = "the model"


def load_prompts(
    settings: PromptsConfig,
    *,
    setting: str,
    path: str,
    split: str,
    limit: int | None,
    tokenizer: Callable[[], Tokenizer],
    limits: Limits,
    max_answer_tokens: int,
    answer_setting: str,
    check: Check,
) -> PromptSet:
    """Read prompts. `setting` and `answer_setting` name where `path` and `max_answer_tokens` come from, for messages.

    Raises UserError naming every bad row: without the column, without tokens, with a ground truth that `check` says
    something of, or with a prompt that leaves no room for an answer of `max_answer_tokens`.
    """
    reader = _Reader(settings, tokenizer, limits.vocab_size)
    room = limits.max_length - max_answer_tokens

    def read(row: Row, _: str) -> Prompt | None:
        tokens, text = reader.prompt(row)
        if len(tokens) > settings.max_tokens:
            return None
        if len(tokens) > room:
            raise BadRow(
                f"a prompt of {len(tokens)} tokens and an answer of {max_answer_tokens} are more than {limits.of} "
                f"takes, {limits.max_length}; lower {answer_setting}, or prompts.max_tokens to leave such prompts out"
            )
        truth = _ground_truth(settings, row)
        problem = check(truth, row)
        if problem is not None:
            raise BadRow(problem)
        return Prompt(tokens, text, truth, row)

    found = read_rows(rows_of(_given(setting, path), split), read, f"{setting} = {path!r} has no rows", limit)
    prompts = tuple(prompt for prompt in found if prompt is not None)
    _refuse_nothing(prompts, setting, path, settings)
    content = [(prompt.tokens, prompt.ground_truth, prompt.row) for prompt in prompts]
    return PromptSet(prompts, len(found) - len(prompts), path, _digest(content))


def load_responses(
    settings: PromptsConfig,
    *,
    setting: str,
    path: str,
    split: str,
    response_column: str,
    tokenizer: Callable[[], Tokenizer],
    limits: Limits,
    stop_token_ids: Sequence[int],
) -> ResponseSet:
    """Read prompts with responses, at whose end EOS is put, the first of `stop_token_ids`, unless one is there.

    Raises UserError as `load_prompts` does, and where the model has no EOS.
    """
    if not stop_token_ids:
        raise UserError("the model has no EOS, and would not learn to end an answer; give its config.json eos_token_id")
    reader = _Reader(settings, tokenizer, limits.vocab_size)

    def read(row: Row, _: str) -> TokenSequence | None:
        prompt, _text = reader.prompt(row)
        response = reader.tokens.ids(response_column, value_of(row, response_column), special=False)
        if not response or response[-1] not in stop_token_ids:
            response = (*response, stop_token_ids[0])
        if len(prompt) > settings.max_tokens or len(prompt) + len(response) > limits.max_length:
            return None
        return TokenSequence(prompt, response)

    found = read_rows(rows_of(_given(setting, path), split), read, f"{setting} = {path!r} has no rows")
    sequences = tuple(sequence for sequence in found if sequence is not None)
    _refuse_nothing(sequences, setting, path, settings)
    content = [(sequence.prompt, sequence.response) for sequence in sequences]
    return ResponseSet(sequences, len(found) - len(sequences), path, _digest(content))


class _Reader:
    """Prompts of rows: as token ids, messages, or text."""

    def __init__(self, settings: PromptsConfig, tokenizer: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._settings = settings

        @cache
        def fitting() -> Tokenizer:
            made = tokenizer()
            if made.size > vocab_size:
                raise UserError(
                    f"the tokenizer of {made.name} gives token ids up to {made.size - 1}, and the model's vocabulary "
                    f"has {vocab_size}: it is another model's; set data.tokenizer, or model.path"
                )
            return made

        self._tokenizer = fitting
        self.tokens = TokenReader(vocab_size, lambda: fitting().encode)

    def prompt(self, row: Row) -> tuple[tuple[int, ...], str]:
        """Token ids, and the text of them as far as it is known without decoding. Raises BadRow."""
        settings = self._settings
        value = value_of(row, settings.prompt_column)
        messages = _messages(value)
        if messages is None and isinstance(value, str):
            value = value if settings.template is None else settings.template.replace("{prompt}", value)
            messages = [{"role": "user", "content": value}] if settings.chat else None
        if messages is not None:
            tokens = self.tokens.made("prompt", messages, lambda some: self._tokenizer().chat(some))
            return self.tokens.prompt(tokens), messages[-1]["content"]
        tokens_of_value = self.tokens.prompt(value)
        text = value if isinstance(value, str) else self._tokenizer().decode(tokens_of_value)
        return tokens_of_value, text


def _messages(value: Any) -> list[dict[str, str]] | None:
    """Chat messages, or None where the value is something else. Raises BadRow for messages that are none."""
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return None
    for place, one in enumerate(value):
        if not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            raise BadRow(f"prompt[{place}] = {short(one)} is no message; give {{'role': text, 'content': text}}")
    return [{"role": one["role"], "content": one["content"]} for one in value]


def _ground_truth(settings: PromptsConfig, row: Row) -> Any:
    if settings.ground_truth_column is not None:
        return value_of(row, settings.ground_truth_column)
    for column in _GROUND_TRUTH:
        try:
            return value_of(row, column)
        except BadRow:
            continue
    return None


def _given(setting: str, path: str) -> str:
    if not path:
        raise UserError(f"{setting} is empty; give a JSONL or Parquet file, a folder of them, or a data set of the hub")
    return path


def _refuse_nothing(found: Sequence[object], setting: str, path: str, settings: PromptsConfig) -> None:
    if not found:
        raise UserError(
            f"{setting} = {path!r}: all rows are longer than prompts.max_tokens = {settings.max_tokens} or than the "
            "model takes; raise prompts.max_tokens"
        )


def _digest(content: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for one in content:
        digest.update(repr(one).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


__all__ = ["Limits", "Prompt", "PromptSet", "ResponseSet", "load_prompts", "load_responses"]
