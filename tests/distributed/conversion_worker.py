"""Worker: Hugging Face -> checkpoint -> Hugging Face, each way under a layout of its own.

torchrun ... -m tests.distributed.conversion_worker JOBS.json; the JSON is a list of
{"kind": "import" | "export", "source", "target", "settings", "dtype", "max_shard_bytes"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_flowrl.checkpoint import convert
from megatron_flowrl.config import load_config
from megatron_flowrl.observe.log import configure_logging
from megatron_flowrl.platform import distributed
from megatron_flowrl.platform.distributed import World, destroy_process_groups, read_world


def run(job: dict[str, Any], world: World) -> None:
    settings = {"model.path": job["source"], "model.make_vocab_size_divisible_by": 8} | job["settings"]
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    configure_logging(config.logging, world.rank)
    target = Path(job["target"])
    if job["kind"] == "import":
        convert.hugging_face_to_megatron(config, world, target, dtype_given="precision.dtype" in job["settings"])
    else:
        convert.megatron_to_hugging_face(
            config, world, target, dtype=job.get("dtype"), max_shard_bytes=job.get("max_shard_bytes", 10**9)
        )


def main() -> None:
    # The group of all ranks is joined once: under one torchrun it cannot be made again.
    distributed.destroy_process_groups = parallel_state.destroy_model_parallel
    world = read_world()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job, world)
    destroy_process_groups()


if __name__ == "__main__":
    main()
