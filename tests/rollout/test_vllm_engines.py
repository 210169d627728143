"""`nccl` and `ipc` as far as they go without a GPU: vLLM's own trainer engine on our stream; what servers are told."""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import open_source
from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.config import load_config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model
from megatron_flowrl.platform import Platform
from megatron_flowrl.rollout.errors import BadReply
from tests.tiny_models import save_model

pytest.importorskip("vllm", reason="vLLM is not installed: requirements/vllm.txt")


class Loop:
    """Stands where HttpLoop stands."""

    def run(self, work: Any) -> Any:
        return asyncio.run(work)


class Server:
    """Stands where ServerControl stands: notes what it is told."""

    def __init__(self, url: str, workers: int = 1, fails: str = "") -> None:
        self.http, self.url, self._workers, self._fails = Loop(), url, workers, fails
        self.told: list[tuple[str, Any]] = []

    async def world_size(self) -> int:
        return self._workers

    async def _note(self, what: str, content: Any = None) -> None:
        self.told.append((what, content))
        if what == self._fails:
            raise BadReply(f"{self.url}/{what} failed")

    async def init_weight_transfer_engine(self, info: Any) -> None:
        await self._note("init", info)

    async def start_weight_update(self) -> None:
        await self._note("start")

    async def update_weights(self, info: Any) -> None:
        await self._note("update", info)

    async def finish_weight_update(self, version: str) -> None:
        await self._note("finish", version)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_tied", tmp_path_factory.mktemp("model"))


@pytest.fixture
def transfer(
    model_folder: Path, one_rank_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Any, dict[str, Tensor]]]:
    """Makes the `nccl` transfer; what it broadcasts, over a communicator that is none, comes with it."""
    from vllm.distributed.weight_transfer import nccl_engine

    from megatron_flowrl.rollout.transfer.vllm_engines import VllmEngineTransfer

    sent: dict[str, Tensor] = {}

    def broadcast(iterator: Iterator[tuple[str, Tensor]], **_: Any) -> None:
        for name, tensor in iterator:
            sent[name] = tensor.clone()

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    monkeypatch.setattr(
        nccl_engine, "open_trainer_endpoint", lambda _: type("Group", (), {"destroy": lambda _: None})()
    )
    config = load_config(None, [f"model.path={model_folder}", "precision.dtype=float32"])
    architecture = read_architecture(model_folder)

    def make() -> tuple[Any, dict[str, Tensor]]:
        model = build_parallel_model(architecture, config, one_rank_platform, log_z=True)
        load_weights(model, open_source(config, architecture))
        return VllmEngineTransfer(WeightStream(model), "nccl", timeout=60), sent

    return make


def test_vllms_engine_sends_the_stream_and_tells_every_server(transfer: Any, model_folder: Path) -> None:
    sends, sent = transfer()
    servers = [Server("http://127.0.0.1:1", workers=2), Server("http://127.0.0.1:2", workers=3)]
    assert sends.init(servers) == {} and sends.send(servers, "7") == {}
    expected = load_file(model_folder / "model.safetensors")
    assert sent.keys() == expected.keys()  # tied embeddings once, no partition function
    assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())
    for server, offset in zip(servers, (1, 3), strict=True):  # the sender is rank 0; workers follow, server by server
        assert [what for what, _ in server.told] == ["init", "start", "update", "finish"]
        init, update = server.told[0][1], server.told[2][1]
        assert init["rank_offset"] == offset and init["world_size"] == 1 + 2 + 3 and init["packed"]
        assert dict(zip(update["names"], update["shapes"], strict=True)) == {
            name: list(tensor.shape) for name, tensor in expected.items()
        }
        assert set(update["dtype_names"]) == {"float32"}
        assert server.told[3][1] == "7"


def test_the_meeting_is_kept_until_the_servers_change(transfer: Any) -> None:
    sends, _ = transfer()
    one, two = Server("http://127.0.0.1:1"), Server("http://127.0.0.1:2")
    for servers in ([one], [one], [one, two]):
        assert sends.send(servers, "1") == {}
    assert [what for what, _ in one.told].count("init") == 2
    assert [what for what, _ in two.told].count("init") == 1


@pytest.mark.parametrize("step", ["init", "start", "update", "finish"])
def test_a_server_that_fails_is_named_and_met_anew(transfer: Any, step: str) -> None:
    sends, _ = transfer()
    well, ill = Server("http://127.0.0.1:1"), Server("http://127.0.0.1:2", fails=step)
    troubles = sends.send([well, ill], "1")
    assert "failed" in str(troubles[ill.url]) and well.url in troubles  # one group: the state of all is unknown
    assert sends.send([Server(well.url)], "2") == {}


def test_a_broken_iteration_is_brought_to_its_end(transfer: Any) -> None:
    sends, _ = transfer()
    source = sends._source
    names = [meta.name for meta in source.metadata()]
    source.begin()
    iterator = iter(source)
    assert next(iterator)[0] == names[0]
    source.drain()
    assert next(iterator, None) is None
    source.begin()
    source.drain()  # as much when nothing was begun


def test_cuda_handles_are_carried_by_json() -> None:
    from megatron_flowrl.rollout.transfer.vllm_engines import FleetClient

    server: Any = Server("http://127.0.0.1:1")
    handles = [{"GPU-1": (1, b"handle")}]
    FleetClient([server]).update_weights(
        {"names": ["a"], "ipc_handles": handles, "tensor_sizes": None, "ipc_handles_pickled": None}
    )
    told = server.told[0][1]
    assert told.keys() == {"names", "ipc_handles_pickled"}
    assert pickle.loads(base64.b64decode(told["ipc_handles_pickled"])) == handles


def test_our_source_is_vllms(transfer: Any) -> None:
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient, WeightSource

    from megatron_flowrl.rollout.transfer.vllm_engines import FleetClient

    sends, _ = transfer()
    assert isinstance(sends._source, WeightSource) and isinstance(FleetClient([]), VLLMWeightSyncClient)
    groups = [name for group in sends._source.groups() for name in group]
    assert sorted(groups) == sorted(meta.name for meta in sends._source.metadata())
