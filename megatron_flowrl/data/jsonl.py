"""Prompts and responses from a JSONL file, a line out for every line in: token ids, or text with a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_flowrl.config import UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.rows import BadRow, Row, lines_of, read_rows, refuse, short

Encode = Callable[[str, bool], list[int]]  # (text, whether special tokens such as BOS are added) -> token ids


def read_prompts(
    path: str | os.PathLike[str], *, vocab_size: int, encode: Callable[[], Encode]
) -> list[tuple[int, ...]]:
    """Read `{"prompt": ...}` lines, one prompt of token ids each; see `read_sequences`. Other keys are not looked at.

    How long a prompt may be is for the caller, who knows what has to follow it. Raises UserError.
    """
    tokens = TokenReader(vocab_size, encode)
    nothing = f"{path} has no lines: give at least one {{'prompt': [...]}}"
    return read_rows(lines_of(Path(path)), lambda row, _: tokens.prompt(*_columns(row, "prompt")), nothing)


def read_sequences(
    path: str | os.PathLike[str], *, vocab_size: int, max_length: int, encode: Callable[[], Encode]
) -> list[TokenSequence]:
    """Read `{"prompt": ..., "response": ...}` lines: lists of token ids, or text.

    `encode` is called, once, to get a tokenizer when there is text. A prompt of text gets the tokenizer's special
    tokens (BOS, where the model has one), a response none: what is scored is what was written.

    A prompt has at least one token: the first response token's log-prob is conditional on what stands before it. A
    response may be empty; its log-prob is 0. Raises UserError naming every bad line (the first ten).
    """
    tokens = TokenReader(vocab_size, encode)

    def read(row: Row, _: str) -> TokenSequence:
        prompt, response = _columns(row, "prompt", "response")
        sequence = TokenSequence(tokens.prompt(prompt), tokens.ids("response", response, special=False))
        if len(sequence) > max_length:
            raise BadRow(
                f"prompt + response has {len(sequence)} tokens; the model takes {max_length} "
                "(its position limit, its sliding window or model.max_sequence_length)"
            )
        return sequence

    nothing = f"{path} has no lines: give at least one {{'prompt': [...], 'response': [...]}}"
    return read_rows(lines_of(Path(path)), read, nothing)


def refuse_lines(path: str | os.PathLike[str], problems: Sequence[tuple[int, str]]) -> None:
    """Raise UserError with what is wrong with lines of a file, by their numbers from 1 (the first ten)."""
    refuse([f"{path}:{number}: {problem}" for number, problem in problems])


class TokenReader:
    """Token ids of what stands in a column. `encode` gets the tokenizer, when there is text."""

    def __init__(self, vocab_size: int, encode: Callable[[], Encode]) -> None:
        self._vocab_size, self._encode = vocab_size, cache(encode)

    def prompt(self, value: Any) -> tuple[int, ...]:
        """Of a prompt, which is not empty. Raises BadRow."""
        prompt = self.ids("prompt", value, special=True)
        if not prompt:
            raise BadRow("prompt is empty; give at least one token (such as BOS) for the response to follow")
        return prompt

    def ids(self, key: str, value: Any, *, special: bool) -> tuple[int, ...]:
        """Of text, or of a list of token ids. Raises BadRow, and UserError where text has no tokenizer."""
        if isinstance(value, str):
            value = self.made(key, value, lambda text: self._encode()(text, special))
        if not isinstance(value, list):
            raise BadRow(f"{key} is a {type(value).__name__}; give a list of token ids, or text")
        for place, token in enumerate(value):
            if type(token) is not int:
                raise BadRow(f"{key}[{place}] = {short(token)} is not a token id")
            if not 0 <= token < self._vocab_size:
                raise BadRow(f"{key}[{place}] = {token} is outside the vocabulary of {self._vocab_size} tokens")
        return tuple(value)

    def made(self, key: str, value: Any, make: Callable[[Any], list[int]]) -> list[int]:
        """What `make` makes of the value. Raises BadRow."""
        try:
            return make(value)
        except UserError:
            raise
        except Exception as error:  # a tokenizer may raise anything; it is about this text
            raise BadRow(f"{key} = {short(value)} cannot be tokenized ({short(error)})") from error


def _columns(row: Row, *keys: str) -> list[Any]:
    missing = [key for key in keys if key not in row]
    if missing:
        raise BadRow(f"the key {' and '.join(missing)} is missing; there are {', '.join(row) or 'none'}")
    return [row[key] for key in keys]


__all__ = ["Encode", "TokenReader", "read_prompts", "read_sequences", "refuse_lines"]
