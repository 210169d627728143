"""Tokenizers: Hugging Face folders, and raw SentencePiece models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from megatron_flowrl.config import UserError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CURE = "set data.tokenizer to a folder with one, or to a SentencePiece .model file, or give token ids instead of text"
_NO_CHAT = "give prompts of text, with prompts.chat=false, or a tokenizer that has one: data.tokenizer"
Messages = Sequence[Mapping[str, str]]  # {"role", "content"} each


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    `encode` and `chat` raise ValueError for text that gives no tokens, `chat` UserError where there is no template.
    """

    name: str
    size: int
    """One more than the largest id it gives."""
    encode: Callable[[str, bool], list[int]]
    """(text, whether special tokens such as BOS are added) -> token ids."""
    decode: Callable[[Sequence[int]], str]
    """Text of token ids, without special tokens."""
    chat: Callable[[Messages], list[int]]
    """Token ids of messages in the chat template, with the start of the answer."""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or of a SentencePiece file. Raises UserError where there is none."""
    given = Path(path)
    if given.is_file():
        return _sentencepiece(given)
    if not any((given / name).is_file() for name in _FILES):
        raise UserError(f"{given} has no tokenizer that can be loaded (none of {', '.join(_FILES)}): {_CURE}")
    try:
        # tokenizer.json says all there is to know. The class a config file names may build another tokenizer than that
        # (DeepSeek-R1-Distill-Qwen names Llama's), so it is only asked where there is no such file.
        whole = (given / "tokenizer.json").is_file()
        kind = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
        return _hugging_face(given, kind.from_pretrained(given, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # transformers raises a dozen kinds, all of them about these files
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{given} has no tokenizer that can be loaded ({reason}): {_CURE}") from error


def _hugging_face(folder: Path, tokenizer: Any) -> Tokenizer:
    def encode(text: str, special: bool) -> list[int]:
        return _some(text, tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def chat(messages: Messages) -> list[int]:
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {folder} has no chat template; {_NO_CHAT}")
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return _some(text, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    ids = tokenizer.get_vocab().values()
    return Tokenizer(str(folder), max(ids, default=-1) + 1, encode, decode, chat)


def _sentencepiece(file: Path) -> Tokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load(str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is no SentencePiece model ({str(error).strip()}): {_CURE}") from error
    control = {number for number in range(model.get_piece_size()) if model.is_control(number)}

    def encode(text: str, special: bool) -> list[int]:
        start = [model.bos_id()] if special and model.bos_id() >= 0 else []
        return start + _some(text, model.encode(text))

    def decode(ids: Sequence[int]) -> str:
        return str(model.decode([number for number in ids if number not in control]))

    def chat(_: Messages) -> list[int]:
        raise UserError(f"{file}, a SentencePiece model, has no chat template; {_NO_CHAT}")

    return Tokenizer(str(file), model.get_piece_size(), encode, decode, chat)


def _some(text: str, ids: list[int]) -> list[int]:
    if text and not ids:
        raise ValueError("the tokenizer makes no token of it")
    return ids


__all__ = ["Messages", "Tokenizer", "load_tokenizer"]
