"""Weights as an exported Hugging Face folder that the servers read: slow, and possible everywhere."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_flowrl.checkpoint.export import export_hugging_face
from megatron_flowrl.checkpoint.stream import WeightStream
from megatron_flowrl.config import UserError
from megatron_flowrl.platform.distributed import together
from megatron_flowrl.rollout.control import ServerControl, on_each
from megatron_flowrl.rollout.transfer.base import Troubles, WeightTransfer, shared


class DiskTransfer(WeightTransfer):
    """All ranks construct it together. Raises UserError where `folder` cannot be written to.

    `companions` is a folder with config.json. The folder of a version is removed when the next one has been read.
    """

    def __init__(self, stream: WeightStream, companions: Path, folder: str | None) -> None:
        super().__init__(stream)
        self._companions = companions
        place = ""
        with together():
            if dist.get_rank() == 0:
                try:
                    if folder is not None:
                        Path(folder).mkdir(parents=True, exist_ok=True)
                    place = tempfile.mkdtemp(prefix="megatron_flowrl_weights.", dir=folder)
                except OSError as error:
                    raise UserError(f"rollout.transfer_folder = {folder!r}: {error.strerror}; give another") from error
        self._folder = Path(shared(place))
        self._count = 0

    def init(self, servers: Sequence[ServerControl]) -> Troubles:
        """See WeightTransfer."""
        return servers[0].http.run(on_each(servers, lambda one: one.init_weight_transfer_engine({}))) if servers else {}

    def send(self, servers: Sequence[ServerControl], version: str) -> Troubles:
        """See WeightTransfer."""
        before, self._count = self._folder / str(self._count), self._count + 1
        now = self._folder / str(self._count)
        with self.times.measuring("copy"):
            export_hugging_face(self.stream, self._companions, now)
        self.version = version
        troubles: Troubles = {}
        if servers:
            with self.times.measuring("load"):
                load = on_each(servers, lambda server: server.give_weights({"folder": str(now)}, version))
                troubles = servers[0].http.run(load)
        if dist.get_rank() == 0:
            shutil.rmtree(before, ignore_errors=True)
        return troubles

    def close(self) -> None:
        """See WeightTransfer."""
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
