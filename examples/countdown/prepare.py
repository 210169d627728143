"""Makes what the demo trains: a model and a tokenizer from nothing, problems, and responses for the warm start.

    python -m examples.countdown.prepare FOLDER [--seed 0]

FOLDER/model is a Hugging Face folder; train.jsonl, validation.jsonl and test.jsonl have problems, sft.jsonl responses
to all others than those in validation.jsonl and test.jsonl. The same seed makes the same files; prepared.json says of
what they are.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from examples.countdown.task import (
    CARELESS,
    COUNT,
    FEWEST,
    NUMBERS,
    PIECES,
    SPLITS,
    STYLES,
    TAKEN_AWAY,
    problems,
    response_row_of,
    row_of,
    split,
    style_of,
)

STAMP = "prepared.json"
RESPONSES_PER_PROBLEM = 50
SIZE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def prepare(folder: Path, seed: int) -> None:
    """Write all of it. Raises OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model", seed)
    found = problems()
    parts = split(found, seed)
    for name, some in parts.items():
        order = random.Random(f"{seed} {name}")
        write_rows(folder / f"{name}.jsonl", (row_of(problem, order) for problem in some))
    held_out = {*parts["validation"], *parts["test"]}
    shown = [problem for problem in found if problem not in held_out]
    chance = random.Random(f"{seed} responses")
    responses = [response_row_of(problem, chance) for problem in shown for _ in range(RESPONSES_PER_PROBLEM)]
    chance.shuffle(responses)
    write_rows(folder / "sft.jsonl", responses)

    styles = Counter(style_of(row["response"]) for row in responses)
    writings = [len(problem.writings) for some in parts.values() for problem in some]
    (folder / STAMP).write_text(json.dumps(stamp(), indent=2) + "\n")
    print(
        f"{folder}: {', '.join(f'{len(some)} problems to {name}' for name, some in parts.items())}, of "
        f"{sum(writings) / len(writings):.1f} writings on average; {len(responses)} responses to {len(shown)}, "
        f"{', '.join(f'{styles[style] / len(responses):.0%} {style}' for style in STYLES)}"
    )


def stamp() -> dict[str, object]:
    """What the files depend on, beside the seed: files of another task are not to be trained on."""
    return {
        "numbers": [NUMBERS.start, NUMBERS.stop - 1],
        "count": COUNT,
        "taken_away": TAKEN_AWAY,
        "fewest": FEWEST,
        "pieces": " ".join(PIECES),
        "splits": SPLITS,
        "styles": STYLES,
        "careless": CARELESS,
        "responses_per_problem": RESPONSES_PER_PROBLEM,
        "size": SIZE,
    }


def save_model(folder: Path, seed: int) -> None:
    """A Qwen2 with random weights, and its tokenizer."""
    eos, pad = PIECES.index("<eos>"), PIECES.index("<pad>")
    config = Qwen2Config(
        vocab_size=len(PIECES),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        **SIZE,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(folder)

    tokenizer = Tokenizer(WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex(r"\d+|[^\d\s]"), "removed", invert=True)
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """JSONL."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        prepare(given.folder, given.seed)
    except OSError as error:
        sys.exit(f"{error.filename or given.folder} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
