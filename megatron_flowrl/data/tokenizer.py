"""Tokenizers: Hugging Face folders."""

from __future__ import annotations

import os

import transformers

from megatron_flowrl.config import UserError
from megatron_flowrl.data.jsonl import Encode


def load_encode(folder: str | os.PathLike[str]) -> Encode:
    """A function from text to token ids, from the tokenizer in `folder`. Raises UserError where there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds, all of them about these files
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"{folder} has no tokenizer that can be loaded ({reason}): set data.tokenizer to a folder with one, "
            "or give token ids instead of text"
        ) from error

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    return encode
