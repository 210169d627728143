"""What both ends of a transfer agree on, and what is refused before anything moves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_flowrl.checkpoint.slices import Slice
from megatron_flowrl.config import RolloutConfig, UserError, load_config
from megatron_flowrl.rollout import serve, server
from megatron_flowrl.rollout.errors import ServerError
from megatron_flowrl.rollout.server import check_shared_memory, resources
from megatron_flowrl.rollout.transfer import shm
from megatron_flowrl.rollout.transfer.wire import (
    TensorEntry,
    cut_into_buckets,
    lay_out,
    messages,
    put_together,
    total_bytes,
)
from tests.distributed.ranks import REPOSITORY

TENSORS = [
    TensorEntry("embedding", torch.float32, (50, 6)),
    TensorEntry("a", torch.float32, (8, 6)),
    TensorEntry("b", torch.bfloat16, (3,)),
    TensorEntry("c", torch.float32, (6, 4)),
    TensorEntry("d", torch.float32, (1,)),
]
# Two senders: rows of the embedding and of a, columns of c cut in two; b and d whole with one of them.
SENDERS = [
    [Slice("embedding", 0, 0, 25), Slice("a", 0, 0, 2), Slice("a", 0, 4, 6), Slice("b", 0, 0, 3), Slice("c", 1, 0, 2)],
    [Slice("embedding", 0, 25, 50), Slice("a", 0, 2, 4), Slice("a", 0, 6, 8), Slice("c", 1, 2, 4), Slice("d", 0, 0, 1)],
]


def test_places_do_not_overlap_and_carry_what_is_put_there() -> None:
    entries = lay_out(TENSORS)
    assert all(entry.offset % 64 == 0 for entry in entries)
    buffer = torch.zeros(total_bytes(entries), dtype=torch.uint8)
    values = [torch.randn(entry.shape).to(entry.dtype) for entry in entries]
    for entry, value in zip(entries, values, strict=True):
        entry.view(buffer).copy_(value)
    assert all(torch.equal(entry.view(buffer), value) for entry, value in zip(entries, values, strict=True))
    assert [TensorEntry.from_wire(entry.to_wire()) for entry in entries] == entries
    assert total_bytes([]) == 0


@pytest.mark.parametrize("bucket_bytes", [1, 150, 1000, 10**6])
@pytest.mark.parametrize("senders", [SENDERS, [[Slice(t.name, 0, 0, t.shape[0]) for t in TENSORS], []]])
def test_pieces_of_all_senders_give_the_tensors_back(bucket_bytes: int, senders: list[list[Slice]]) -> None:
    whole = {entry.name: torch.randn(entry.shape).to(entry.dtype) for entry in TENSORS}
    buckets = cut_into_buckets(TENSORS, bucket_bytes)
    by_sender = [messages(buckets, pieces) for pieces in senders]
    found: dict[str, Any] = {}
    for number, bucket in enumerate(buckets):
        received = []
        for one in by_sender:
            content = torch.zeros(one[number].nbytes, dtype=torch.uint8)
            for piece, place in zip(one[number].pieces, one[number].places, strict=True):
                place.view(content).copy_(piece.of(whole[piece.name]))
            if one[number].nbytes:
                received.append((one[number], content))
        found |= dict(put_together(bucket, received))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in whole.items())


def test_large_tensors_come_last_and_buckets_are_bounded() -> None:
    buckets = cut_into_buckets(TENSORS, 300)
    assert [[entry.name for entry in bucket] for bucket in buckets] == [["a", "b", "c", "d"], ["embedding"]]
    for bucket in cut_into_buckets(TENSORS, 200):
        assert len(bucket) == 1 or sum(entry.nbytes for entry in bucket) <= 200


def test_vllms_processes_see_nothing_of_the_trainer() -> None:
    """The plugin registers its names, twice without harm, and nothing of Megatron or its stand-in is imported."""
    pytest.importorskip("vllm", reason="vLLM is not installed: requirements/vllm.txt")
    code = (
        "import sys; from importlib.metadata import entry_points;"
        "(ours,) = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'megatron_flowrl'];"
        "register = ours.load(); register(); register();"
        "import megatron_flowrl.rollout.transfer.worker;"
        "from vllm.distributed.weight_transfer import WeightTransferEngineFactory as factory;"
        "assert {'shm', 'gloo', 'disk'} <= factory._registry.keys();"
        "names = [n for n in sys.modules if n.startswith('megatron')];"
        "assert not [n for n in names if n.startswith('megatron.') or 'stand_in' in n or '.platform' in n], names"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=120)


def test_memory_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=r"rollout\.transfer = shm: 3 MiB of shared memory .*No space left"):
        shm._reserve(3 * 2**20)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_full_shared_memory_folder_is_named(tmp_path: Path) -> None:
    """A real one, of a megabyte, in a name space of its own."""
    code = "from megatron_flowrl.rollout.server import check_shared_memory; check_shared_memory(2)"
    script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && "{sys.executable}" -c "{code}"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode != 0
    assert "/dev/shm has 1 MiB free; a vLLM server of 2 workers needs 128 MiB" in done.stderr
    check_shared_memory(1)


def test_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    two = RolloutConfig(servers=2, tensor_parallel_size=2)
    assert resources(RolloutConfig(servers=2), {}, gpus=0) == [{}, {}]
    assert resources(two, {}, gpus=0) == [{"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}] * 2
    assert resources(two, {"VLLM_CPU_OMP_THREADS_BIND": "1|2"}, gpus=0) == [{}, {}]
    assert resources(two, {}, gpus=4) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    last = RolloutConfig(tensor_parallel_size=2, first_gpu=2)
    assert resources(last, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, gpus=4) == [{"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(ServerError, match=r"need 4 GPUs from rollout\.first_gpu = 1 on; this machine shows 3"):
        resources(RolloutConfig(servers=2, tensor_parallel_size=2, first_gpu=1), {}, gpus=4)


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (0, [], "shm"),
        (8, [], "nccl"),
        (8, ["rollout.colocated=true"], "ipc"),
        (0, ["rollout.transfer=gloo"], "gloo"),
        (8, ["rollout.transfer=disk"], "disk"),
        (0, ["rollout.transfer=nccl"], "rollout.transfer = nccl needs GPUs"),
        (8, ["rollout.transfer=shm"], "rollout.transfer = shm moves weights between CPUs"),
    ],
)
def test_the_way_for_the_weights(
    gpus: int, settings: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "visible_gpus", lambda: gpus)
    config = load_config(None, settings)
    if " " not in expected:
        assert serve.transfer_backend(config) == expected
        return
    with pytest.raises(UserError, match=expected):
        serve.transfer_backend(config)


def test_sleep_mode_is_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RolloutConfig(colocated=True, max_num_seqs=7)
    for gpus, there in ((0, False), (2, True)):
        monkeypatch.setattr(server, "visible_gpus", lambda gpus=gpus: gpus)
        command = server.VllmServer(settings, tmp_path, tmp_path / "log", port=4321, transfer="disk").command()
        assert ("--enable-sleep-mode" in command) == there
        assert command[command.index("--weight-transfer-config") + 1] == '{"backend": "disk"}'
        assert command[command.index("--max-num-seqs") + 1] == "7"
