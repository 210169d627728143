"""What a path to a model means: a Hugging Face folder, a checkpoint of this program, or a run's checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_flowrl.checkpoint.folder import find_checkpoint

COMPANIONS = "hugging_face"  # the folder inside a checkpoint with config.json and tokenizer


@dataclass(frozen=True)
class ModelFolder:
    """`hugging_face` has config.json and tokenizer; the weights are in `checkpoint` or, without one, there too."""

    hugging_face: Path
    checkpoint: Path | None


def locate_model(path: str | os.PathLike[str]) -> ModelFolder:
    """Raises UserError for a run's folder whose newest checkpoint cannot be told; others are for the readers."""
    checkpoint = find_checkpoint(Path(path))
    if checkpoint is None:
        return ModelFolder(Path(path), None)
    return ModelFolder(checkpoint / COMPANIONS, checkpoint)
