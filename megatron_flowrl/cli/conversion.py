"""`convert`: between Hugging Face folders and checkpoints."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_flowrl.cli.parsers import command_parser, plain_parser, settings
from megatron_flowrl.config import given_keys

_CONVERT = """Between Hugging Face folders and checkpoints of this program.

  hf-to-megatron HF_DIR OUT_DIR   a checkpoint of step 0 in the new folder OUT_DIR; weights keep the dtype of the
                                  files, unless precision.dtype is given
  megatron-to-hf DIR OUT_DIR      the weights of a checkpoint (or of the latest in a run's folder) as a new
                                  Hugging Face folder, with configuration and tokenizer
  inspect DIR                     what a checkpoint or a Hugging Face folder holds; verifies checksums

Every rank reads and holds only its part, in any layout:

  megatron-flowrl convert hf-to-megatron models/Qwen2.5-7B checkpoints/start
  torchrun --nproc_per_node 4 -m megatron_flowrl convert megatron-to-hf runs/math/checkpoints out \\
      parallel.tensor_model_parallel_size=4
"""
_CONVERT_SECTIONS = ("seed", "model", "parallel", "precision", "logging")
_EXPORT_SECTIONS = ("model", "parallel", "logging")
_INSPECT_SECTIONS = ("logging",)


def convert(arguments: Sequence[str]) -> None:
    """One of the kinds of conversion, or an inspection."""
    parser = plain_parser("convert", _CONVERT)
    kinds = {"hf-to-megatron": _hf_to_megatron, "megatron-to-hf": _megatron_to_hf, "inspect": _inspect}
    parser.add_argument("kind", choices=tuple(kinds), help="see KIND --help")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    parsed = parser.parse_args(arguments)
    kinds[parsed.kind](parsed.rest)


def _hf_to_megatron(arguments: Sequence[str]) -> None:
    name = "convert hf-to-megatron"
    parser = command_parser(name, "A Hugging Face folder as a checkpoint.", _CONVERT_SECTIONS, "HF_DIR", "OUT_DIR")
    given = parser.parse_intermixed_args(arguments)
    config, world = settings(name, given, _CONVERT_SECTIONS, given.HF_DIR)
    from megatron_flowrl.checkpoint.convert import hugging_face_to_megatron

    dtype_given = "precision.dtype" in given_keys(given.recipe, given.overrides)
    hugging_face_to_megatron(config, world, Path(given.OUT_DIR), dtype_given=dtype_given)


def _megatron_to_hf(arguments: Sequence[str]) -> None:
    name = "convert megatron-to-hf"
    parser = command_parser(
        name, "A checkpoint's weights as a Hugging Face folder.", _EXPORT_SECTIONS, "DIR", "OUT_DIR"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    parser.add_argument(
        "--max-shard-size", type=_bytes, default="5GB", metavar="SIZE",
        help="largest safetensors file, as 5GB or 200MB (default: 5GB)",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    config, world = settings(name, given, _EXPORT_SECTIONS, given.DIR)
    from megatron_flowrl.checkpoint.convert import megatron_to_hugging_face

    output = Path(given.OUT_DIR)
    megatron_to_hugging_face(config, world, output, dtype=given.dtype, max_shard_bytes=given.max_shard_size)


def _inspect(arguments: Sequence[str]) -> None:
    name = "convert inspect"
    parser = command_parser(name, "What a folder holds, and whether it is whole.", _INSPECT_SECTIONS, "DIR")
    given = parser.parse_intermixed_args(arguments)
    config, _ = settings(name, given, _INSPECT_SECTIONS)
    from megatron_flowrl.checkpoint.inspect import inspect

    for line in inspect(Path(given.DIR), config):
        print(line)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0 such as 5GB or 200MB")
    return size
