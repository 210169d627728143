"""A step's rollout as a file: written whole before it is used, so that it is never sampled twice.

A run that was cut off takes up the records that it had made but not trained on, and another run can be trained on them
(`rollout.replay`). A record is a safetensors file of token ids, log-probs, rewards and groups; what is not a tensor,
and the SHA-256 of everything, is in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from megatron_flowrl.config import UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.platform.atomic import remove, write_bytes
from megatron_flowrl.rollout.generation import VersionSpan

_FORMAT = "1"
_NAME = re.compile(r"(\d{8,})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """M answers of one step, prompt by prompt, with T tokens in all."""

    step: int
    position: int  # prompts that were taken from the data before this step
    source: str  # what the prompts and the settings of the sampler were, as a digest
    prompt_numbers: tuple[int, ...]  # [M]: which of the data's prompts each answers
    sequences: tuple[TokenSequence, ...]
    groups: tuple[int, ...]  # [M]: answers to one prompt share a number
    rewards: tuple[float, ...]
    log_probs: Tensor  # fp32 [T], the sampler's
    finish_reasons: tuple[str, ...]
    keys: tuple[str | None, ...]  # canonical form of each answer, where the grader knows one
    problems: tuple[str | None, ...]  # why an answer could not be graded
    weight_versions: tuple[tuple[VersionSpan, ...], ...]
    seconds: Mapping[str, float]  # what it took, by phase

    @property
    def prompts(self) -> int:
        """Prompts of the step."""
        return len(set(self.groups))

    @property
    def next_position(self) -> int:
        """The place in the data after this step."""
        return self.position + self.prompts

    def answer_log_probs(self) -> list[list[float]]:
        """The sampler's log-probs, answer by answer."""
        return [part.tolist() for part in self.log_probs.split([len(s.response) for s in self.sequences])]

    def check_tokens(self, vocab_size: int, where: str) -> None:
        """Raises UserError, naming `where` it is from, for tokens that a model of this vocabulary does not have."""
        for sequence in self.sequences:
            for token in (*sequence.prompt, *sequence.response):
                if not 0 <= token < vocab_size:
                    raise UserError(
                        f"{where} has token {token}, and the model's vocabulary has {vocab_size}: it was recorded with "
                        "another model; give the folder of a run of this one"
                    )

    def encode(self) -> bytes:
        """The content of its file."""
        tensors = {
            "prompt_tokens": _flat(sequence.prompt for sequence in self.sequences),
            "prompt_offsets": _offsets(len(sequence.prompt) for sequence in self.sequences),
            "response_tokens": _flat(sequence.response for sequence in self.sequences),
            "response_offsets": _offsets(len(sequence.response) for sequence in self.sequences),
            "log_probs": self.log_probs.float().contiguous(),
            "rewards": torch.tensor(self.rewards, dtype=torch.float64),
            "groups": torch.tensor(self.groups, dtype=torch.int64),
            "prompt_numbers": torch.tensor(self.prompt_numbers, dtype=torch.int64),
        }
        about = json.dumps(
            {
                "step": self.step,
                "position": self.position,
                "source": self.source,
                "finish_reasons": self.finish_reasons,
                "keys": self.keys,
                "problems": self.problems,
                "weight_versions": [[(s.version, s.start, s.stop) for s in spans] for spans in self.weight_versions],
                "seconds": dict(self.seconds),
            }
        )
        metadata = {"format": _FORMAT, "about": about, "sha256": _digest(tensors, about)}
        return save_tensors(tensors, metadata)


def decode(content: bytes, where: str) -> RolloutRecord:
    """The record in a file's content. Raises UserError, naming `where` it is from, for one that is not whole."""
    try:
        tensors = load_tensors(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if metadata["format"] != _FORMAT:
            raise ValueError(f"its format is {metadata['format']}, and this program reads {_FORMAT}")
        if metadata["sha256"] != _digest(tensors, metadata["about"]):
            raise ValueError("its checksum is another: it is damaged")
        about = json.loads(metadata["about"])
        prompts = _split(tensors["prompt_tokens"], tensors["prompt_offsets"])
        responses = _split(tensors["response_tokens"], tensors["response_offsets"])
        record = RolloutRecord(
            step=about["step"],
            position=about["position"],
            source=about["source"],
            prompt_numbers=tuple(tensors["prompt_numbers"].tolist()),
            sequences=tuple(TokenSequence(*both) for both in zip(prompts, responses, strict=True)),
            groups=tuple(tensors["groups"].tolist()),
            rewards=tuple(tensors["rewards"].tolist()),
            log_probs=tensors["log_probs"],
            finish_reasons=tuple(about["finish_reasons"]),
            keys=tuple(about["keys"]),
            problems=tuple(about["problems"]),
            weight_versions=tuple(tuple(VersionSpan(*s) for s in spans) for spans in about["weight_versions"]),
            seconds=about["seconds"],
        )
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{where} is no whole record of a rollout: {error}") from error
    return record


class RecordFolder:
    """A folder with a file a step. Only one rank may change it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, step: int) -> Path:
        """Where the record of a step is, or would be."""
        return self.root / f"{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Steps that have a record, oldest first."""
        if not self.root.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def read(self, step: int) -> bytes | None:
        """The content of a step's file; None where there is none. Raises UserError for one that cannot be read."""
        path = self.path_of(step)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def write(self, step: int, content: bytes) -> None:
        """Put a step's file in its place, whole. Raises UserError where the disk does not take it."""
        path = self.path_of(step)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; the rollout of step {step} is lost, and is sampled again "
                "at the next start"
            ) from error

    def prune(self, keep: int, consumed: int) -> None:
        """Delete the records of steps up to `consumed`, which a checkpoint holds, but for the last `keep`."""
        for step in [step for step in self.steps() if step <= consumed][:-keep]:
            remove(self.path_of(step))


def _flat(parts: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor([token for part in parts for token in part], dtype=torch.int32)


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)


def _split(flat: Tensor, offsets: Tensor) -> list[tuple[int, ...]]:
    return [tuple(part.tolist()) for part in flat.split(offsets.diff().tolist())]


def _digest(tensors: Mapping[str, Tensor], about: Any) -> str:
    digest = hashlib.sha256(str(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


__all__ = ["RecordFolder", "RolloutRecord", "decode"]
