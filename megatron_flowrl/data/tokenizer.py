"""Tokenizers: Hugging Face folders."""

from __future__ import annotations

import os
from pathlib import Path

import transformers

from megatron_flowrl.config import UserError
from megatron_flowrl.data.jsonl import Encode

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_encode(folder: str | os.PathLike[str]) -> Encode:
    """A function from text to token ids, from the tokenizer in `folder`. Raises UserError where there is none."""
    if not any((Path(folder) / name).is_file() for name in _FILES):
        raise UserError(
            f"{folder} has no tokenizer that can be loaded (none of {', '.join(_FILES)}): set data.tokenizer to a "
            "folder with one, or give token ids instead of text"
        )
    try:
        # tokenizer.json says all there is to know. The class a config file names may build another tokenizer than that
        # (DeepSeek-R1-Distill-Qwen names Llama's), so it is only asked where there is no such file.
        whole = (Path(folder) / "tokenizer.json").is_file()
        kind = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds, all of them about these files
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"{folder} has no tokenizer that can be loaded ({reason}): set data.tokenizer to a folder with one, "
            "or give token ids instead of text"
        ) from error

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if text and not ids:
            raise ValueError("the tokenizer makes no token of it")
        return ids

    return encode
