"""`megatron-flowrl score`: the log-prob of every response token of a file, under any parallel layout."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import WeightSource, open_source
from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.jsonl import read_sequences
from megatron_flowrl.data.packing import PackingPlan
from megatron_flowrl.data.tokenizer import load_tokenizer
from megatron_flowrl.model.architecture import Architecture, read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, freeze
from megatron_flowrl.model.layout import check_layout, max_sequence_length
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.observe.log import logger, progress
from megatron_flowrl.platform.distributed import (
    World,
    alike,
    check_agreement,
    together,
)
from megatron_flowrl.training.passes import ScoredTokens, forward_only, gather_tokens, local_batches
from megatron_flowrl.training.session import Session, prepared

_TEMPORARY = ".megatron-flowrl."
_T = TypeVar("_T")


def score(config: Config, world: World, input_path: str, output_path: str) -> None:
    """Score `input_path` (JSONL) into `output_path`: a line out for each line in, in their order.

    {"log_probs": [one per response token], "log_prob": their sum, "entropy": [...] with log_prob.entropy}; a number
    that is not finite is null. Everything the user gave is checked before the model is built; the output appears
    whole or not at all. Raises UserError.
    """
    with prepared(config, world) as session:

        def read(architecture: Architecture) -> list[TokenSequence]:
            return read_sequences(
                input_path,
                vocab_size=architecture.vocab_size,
                max_length=max_sequence_length(architecture, session.config),
                encode=lambda: load_tokenizer(session.tokenizer).encode,
            )

        checked = check_inputs(session, input_path, output_path, read)
        sequences = checked.content
        with alike():
            rules = packing_rules(session.config, checked.architecture, session.replicas)
            packing = plan([len(s) for s in sequences], rules)
        logger.info("%s, %s", session.layout(), packing.describe())

        model = load_frozen(session, checked)
        started = time.perf_counter()
        scored = score_sequences(model, sequences, packing, session)
        seconds = time.perf_counter() - started
        with together():
            if world.rank == 0:
                _write(scored, output_path)
        tokens = sum(map(len, sequences))
        logger.info(
            "scored %d sequences, %d tokens in %.1f s (%.0f tokens/s) into %s",
            len(sequences), tokens, seconds, tokens / seconds, output_path,
        )  # fmt: skip


@dataclass(frozen=True)
class Checked(Generic[_T]):
    """What `check_inputs` has found to be good: the model's shape, its weights, still unread, and the input."""

    architecture: Architecture
    source: WeightSource
    content: _T


def check_inputs(
    session: Session, input_path: str, output_path: str, read: Callable[[Architecture], _T]
) -> Checked[_T]:
    """Look at all the user gave before anything is built; `read` brings the input file's content on every rank.

    Raises SharedUserError, also where ranks see different files.
    """
    with together():
        architecture = read_architecture(session.folder.hugging_face)
        check_layout(architecture, session.config)
        if session.world.rank == 0:  # the one that writes
            check_output(input_path, output_path)
        source = open_source(session.config, architecture)
        content = read(architecture)
    check_agreement(f"--input {input_path!r}", content)
    check_agreement("the checkpoint that the path leads to", session.config.model.path)
    check_agreement(f"{session.folder.hugging_face}/config.json", architecture)
    return Checked(architecture, source, content)


def load_frozen(session: Session, checked: Checked[Any]) -> ParallelModel:
    """This rank's part of the model, with its weights, for passes without gradients."""
    model = freeze(build_parallel_model(checked.architecture, session.config, session.platform))
    load_weights(model, checked.source)
    return model


def score_sequences(
    model: ParallelModel, sequences: Sequence[TokenSequence], packing: PackingPlan, session: Session
) -> ScoredTokens:
    """Log-probs, and entropies where log_prob.entropy asks for them, on every rank. All ranks call it together."""
    batches = local_batches(sequences, packing, 0, session.platform.device)
    settings, entropy = session.config.log_prob, session.config.log_prob.entropy
    with progress(session.config.logging, session.world.rank, len(batches) * len(model.chunks), "scoring") as advance:
        outputs = forward_only(
            model.chunks, batches, settings, entropy="detached" if entropy else "none", listener=_Shown(advance)
        )
    return gather_tokens(sequences, batches, outputs, entropy=entropy)


@dataclass(frozen=True)
class _Shown:
    micro_batch: Callable[[], None]

    def end(self) -> None:
        """What is shown is over then, too."""


def check_output(input_path: str, output_path: str) -> None:
    """Raises UserError where the output file could not be written at the end, or is the input."""
    output = Path(output_path)
    try:
        if output.is_dir():
            raise UserError(f"--output {output_path!r} is a folder; give a file")
        if output.exists() and not output.is_file():
            raise UserError(f"--output {output_path!r} is a pipe or a device, which cannot be replaced; give a file")
        if output.parent.is_dir():
            with tempfile.NamedTemporaryFile(dir=output.resolve().parent, prefix=_TEMPORARY, suffix=output.name[-200:]):
                pass
            os.stat(output.parent / f"{output.name}")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--output {output_path!r} cannot be used: {reason}") from error
    if not output.parent.is_dir():
        raise UserError(f"--output {output_path!r}: the folder {str(output.parent)!r} does not exist; create it")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output_path!r}: the folder {str(output.parent)!r} cannot be written to")
    if output.exists() and Path(input_path).exists() and output.samefile(input_path):
        raise UserError(f"--output {output_path!r} is the input file; give another")


def _write(scored: ScoredTokens, output_path: str) -> None:
    unusable = 0
    with whole_file(Path(output_path)) as file:
        for index in range(len(scored.offsets) - 1):
            log_probs, entropy = scored.of_sequence(index)
            record: dict[str, object] = {"log_probs": finite_or_null(log_probs.tolist())}
            total = math.fsum(log_probs.tolist()) if bool(log_probs.isfinite().all()) else None
            record["log_prob"] = total
            if entropy is not None:
                record["entropy"] = finite_or_null(entropy.tolist())
            unusable += total is None
            file.write(json.dumps(record) + "\n")
    if unusable:
        logger.warning("%d sequences have log-probs that are not finite (null in the output)", unusable)


def finite_or_null(values: Sequence[float]) -> list[float | None]:
    """JSON knows no NaN and no infinity."""
    return [value if math.isfinite(value) else None for value in values]


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Write beside `path` and move into place at the end: nobody sees half a file. Raises UserError."""
    path = path.resolve()  # a link stays one
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY)
    except OSError as error:
        raise UserError(f"--output {str(path)!r} cannot be written: {error.strerror}") from error
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise UserError(f"--output {str(path)!r} cannot be written: {error.strerror}") from error
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
