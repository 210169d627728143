"""The process group: from torchrun's environment, or of one process, and Megatron's groups inside it."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_flowrl.config import ParallelConfig, SharedUserError, UserError
from megatron_flowrl.platform import Platform

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all, as its environment says."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    under_torchrun: bool = False


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read torchrun's variables; without any of them the world is this process.

    Raises UserError where some are missing, or are not numbers that fit together.
    """
    given = [name for name in _TORCHRUN if name in environment]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return World()
    missing = [name for name in _TORCHRUN if name not in given]
    if missing:
        raise UserError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}: start with torchrun, or unset all"
        )
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        try:
            values[name] = int(environment[name])
        except ValueError:
            raise UserError(f"environment variable {name} = {environment[name]!r} is not a whole number") from None
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise UserError(f"environment: RANK = {values['RANK']} is not below WORLD_SIZE = {values['WORLD_SIZE']}")
    if not 0 <= values["LOCAL_RANK"] < values["WORLD_SIZE"]:
        raise UserError(
            f"environment: LOCAL_RANK = {values['LOCAL_RANK']} is not below WORLD_SIZE = {values['WORLD_SIZE']}"
        )
    return World(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], under_torchrun=True)


def initialize_process_groups(world: World, parallel: ParallelConfig, platform: Platform, seed: int) -> None:
    """Join the process group and make Megatron's tensor, pipeline, context and data-parallel groups.

    A process group that has been joined already is kept. A rank that does not answer within
    `distributed_timeout_minutes` ends the run.
    """
    from megatron.core import parallel_state, tensor_parallel

    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    if dist.is_initialized():
        pass
    elif world.under_torchrun:
        dist.init_process_group(platform.backend, timeout=timeout)
    else:
        dist.init_process_group(
            platform.backend,
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=timeout,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def process_groups(world: World, parallel: ParallelConfig, platform: Platform, seed: int) -> Iterator[None]:
    """The groups of `initialize_process_groups` for a block, left in order where all ranks leave it."""
    initialize_process_groups(world, parallel, platform, seed)
    try:
        yield
    except BaseException as error:
        # After an error of this rank alone the others may be inside a collective: leaving in order would wait for them.
        if world.size == 1 or isinstance(error, SharedUserError):
            destroy_process_groups()
        raise
    destroy_process_groups()


def destroy_process_groups() -> None:
    """Leave all groups; safe to call when none was joined."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """What a rank finds wrong with the user's input inside, every rank raises: none is left waiting for another.

    No collective may stand inside: a rank that has left early would take part in another one.
    """
    problems: tuple[str, ...] = ()
    try:
        yield
    except UserError as error:
        problems = error.problems
    found: list[tuple[str, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, problems)
    every = dict.fromkeys(problem for rank_problems in found for problem in rank_problems)
    if every:
        raise SharedUserError(*every)


@contextmanager
def alike() -> Iterator[None]:
    """For what every rank is given alike, such as settings: they all meet the same problem, without a word."""
    try:
        yield
    except UserError as error:
        raise SharedUserError(*error.problems) from error


def check_agreement(what: str, content: object) -> None:
    """Refuse what is not the same on all ranks, such as a file that differs from node to node."""
    digest = hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise SharedUserError(f"{what} is not the same on rank 0 and on rank {', '.join(map(str, others[:8]))}")


def broadcast_bytes(content: bytes | None, group: dist.ProcessGroup) -> bytes | None:
    """Rank 0's bytes, or None, on every rank of a gloo group of all; memory for them twice."""
    size = torch.tensor(-1 if content is None else len(content), dtype=torch.int64)
    dist.broadcast(size, src=0, group=group)
    if size < 0:
        return None
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if content is not None:
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if len(buffer):
        dist.broadcast(buffer, src=0, group=group)
    return content if dist.get_rank() == 0 else buffer.numpy().tobytes()


def layout_of() -> dict[str, int]:
    """The sizes of the groups that were made."""
    from megatron.core import parallel_state

    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }


def to_all_pipeline_stages(values: torch.Tensor) -> torch.Tensor:
    """Broadcast what the last pipeline stage holds, in place: one collective for one flat tensor."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values
