"""Prompts and responses from a JSONL file: token ids, or text with a tokenizer. Every line is checked as it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_flowrl.config import UserError
from megatron_flowrl.data.batch import TokenSequence

Encode = Callable[[str, bool], list[int]]  # (text, whether special tokens such as BOS are added) -> token ids
_MOST_PROBLEMS = 10
_T = TypeVar("_T")


def read_prompts(
    path: str | os.PathLike[str], *, vocab_size: int, encode: Callable[[], Encode]
) -> list[tuple[int, ...]]:
    """Read `{"prompt": ...}` lines, one prompt of token ids each; see `read_sequences`. Other keys are not looked at.

    How long a prompt may be is for the caller, who knows what has to follow it. Raises UserError.
    """
    reader = _LineReader(vocab_size, encode)
    return _read(Path(path), reader.prompt, "{'prompt': [...]}")


def read_sequences(
    path: str | os.PathLike[str], *, vocab_size: int, max_length: int, encode: Callable[[], Encode]
) -> list[TokenSequence]:
    """Read `{"prompt": ..., "response": ...}` lines: lists of token ids, or text.

    `encode` is called, once, to get a tokenizer when there is text. A prompt of text gets the tokenizer's special
    tokens (BOS, where the model has one), a response none: what is scored is what was written.

    A prompt has at least one token: the first response token's log-prob is conditional on what stands before it. A
    response may be empty; its log-prob is 0. Raises UserError naming every bad line (the first ten).
    """
    reader = _LineReader(vocab_size, encode)
    return _read(Path(path), lambda line: reader.sequence(line, max_length), "{'prompt': [...], 'response': [...]}")


def refuse_lines(path: str | os.PathLike[str], problems: Sequence[tuple[int, str]]) -> None:
    """Raise UserError with what is wrong with lines of a file, by their numbers from 1 (the first ten)."""
    if problems:
        told = [f"{path}:{number}: {problem}" for number, problem in problems[:_MOST_PROBLEMS]]
        left_out = len(problems) - _MOST_PROBLEMS
        raise UserError(*told, *([f"{path}: {left_out} more bad lines"] if left_out > 0 else []))


def _read(path: Path, read: Callable[[bytes], _T], example: str) -> list[_T]:
    found, problems = [], []
    for number, line in _lines(path):
        try:
            found.append(read(line))
        except _BadLine as error:
            problems.append((number, str(error)))
    if not found and not problems:
        raise UserError(f"{path} has no lines: give at least one {example}")
    refuse_lines(path, problems)
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            blank: list[tuple[int, bytes]] = []
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from blank
                    blank.clear()
                    yield number, line
                else:  # at the end of a file it does no harm; elsewhere lines out would not match lines in
                    blank.append((number, line))
    except FileNotFoundError:
        raise UserError(f"input file {str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"input file {str(path)!r} cannot be read: {reason}") from None


class _BadLine(Exception):
    pass


class _LineReader:
    def __init__(self, vocab_size: int, encode: Callable[[], Encode]) -> None:
        self._vocab_size = vocab_size
        self._make_encode = encode
        self._encode: Encode | None = None

    def prompt(self, line: bytes) -> tuple[int, ...]:
        return self._prompt(self._record(line, "prompt"))

    def sequence(self, line: bytes, max_length: int) -> TokenSequence:
        record = self._record(line, "prompt", "response")
        prompt = self._prompt(record)
        response = self._tokens("response", record["response"], special=False)
        if len(prompt) + len(response) > max_length:
            raise _BadLine(
                f"prompt + response has {len(prompt) + len(response)} tokens; the model takes {max_length} "
                "(its position limit, its sliding window or model.max_sequence_length)"
            )
        return TokenSequence(prompt, response)

    def _record(self, line: bytes, *keys: str) -> dict[str, Any]:
        if not line.strip():
            raise _BadLine("an empty line; every line in is a line out: leave it out")
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise _BadLine(f"is not UTF-8 text ({error})") from None
        except (ValueError, RecursionError) as error:
            raise _BadLine(f"not JSON ({error})") from None
        if not isinstance(record, dict):
            wanted = "key" if len(keys) == 1 else "keys"
            raise _BadLine(f"a JSON {type(record).__name__}, not an object with the {wanted} {' and '.join(keys)}")
        missing = [key for key in keys if key not in record]
        if missing:
            raise _BadLine(f"the key {' and '.join(missing)} is missing; there are {', '.join(record) or 'none'}")
        return record

    def _prompt(self, record: dict[str, Any]) -> tuple[int, ...]:
        prompt = self._tokens("prompt", record["prompt"], special=True)
        if not prompt:
            raise _BadLine("prompt is empty; give at least one token (such as BOS) for the response to follow")
        return prompt

    def _tokens(self, key: str, value: Any, *, special: bool) -> tuple[int, ...]:
        if isinstance(value, str):
            if self._encode is None:
                self._encode = self._make_encode()
            try:
                value = self._encode(value, special)
            except Exception as error:  # a tokenizer may raise anything; it is about this text
                raise _BadLine(f"{key} = {_short(value)} cannot be tokenized ({_short(error)})") from error
        if not isinstance(value, list):
            raise _BadLine(f"{key} is a {type(value).__name__}; give a list of token ids, or text")
        for place, token in enumerate(value):
            if type(token) is not int:
                raise _BadLine(f"{key}[{place}] = {_short(token)} is not a token id")
            if not 0 <= token < self._vocab_size:
                raise _BadLine(f"{key}[{place}] = {token} is outside the vocabulary of {self._vocab_size} tokens")
        return tuple(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
