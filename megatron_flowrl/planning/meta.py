"""The real model on meta tensors, at any number of ranks, in a process of its own.

Megatron's own modules are built for a rank of every pipeline stage, as `train` builds them, with process groups that
never speak (torch's fake back end) and tensors that have a shape and no memory. That leaves marks in a process:
Megatron's global groups, and what stands in for torch.cuda on a CPU. So `real_stages` starts another one, without a
GPU, whose layers have the parameters of Transformer Engine's, by name, shape and dtype (tests/model).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_flowrl.config import Config, PrecisionConfig, UserError, load_config, to_yaml
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.planning.parameters import Parameter, Stage

_SECONDS = 300.0
_MARK = "stages: "


def real_stages(
    architecture: Architecture, config: Config, world_size: int, *, log_z: bool = False, value_head: bool = False
) -> list[Stage]:
    """The parameters of a rank of each pipeline stage, chunk by chunk.

    Raises UserError where the model cannot be built, with what Megatron says.
    """
    # FP8 is Transformer Engine's: weights that it keeps in FP8 are counted afterwards.
    plain = PrecisionConfig(dtype=config.precision.dtype)
    asked = {
        "architecture": asdict(architecture),
        "world_size": world_size,
        "log_z": log_z,
        "value_head": value_head,
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(to_yaml(replace(config, precision=plain)))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "megatron_flowrl.planning.meta", str(recipe)],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"the model was not built on meta tensors within {_SECONDS:.0f} s") from None
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found:
        said = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        raise UserError(f"the model cannot be built in this layout: {said[0]}")
    stages = json.loads(found[0].removeprefix(_MARK))
    return [tuple(tuple(_parameter(one, config) for one in chunk) for chunk in stage) for stage in stages]


def _parameter(one: dict[str, Any], config: Config) -> Parameter:
    parameter = Parameter(**one)
    fp8 = parameter.matrix and config.precision.fp8_param_gather
    return replace(parameter, itemsize=1) if fp8 else parameter


def build_stages(
    architecture: Architecture, config: Config, world_size: int, *, log_z: bool, value_head: bool
) -> list[list[list[dict[str, Any]]]]:
    """The same in this process, as fields of `Parameter`. Leaves what `real_stages` spares its caller."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_flowrl.model.build import build_parallel_model
    from megatron_flowrl.platform import current_platform
    from megatron_flowrl.platform.distributed import destroy_process_groups

    parallel, stages = config.parallel, []
    platform = replace(current_platform(), device=torch.device("meta"))
    for stage in range(parallel.pipeline_model_parallel_size):
        rank = stage * (world_size // parallel.pipeline_model_parallel_size)  # Megatron's order: stages are outermost
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        assert parallel_state.get_pipeline_model_parallel_rank() == stage
        with torch.device("meta"):
            model = build_parallel_model(architecture, config, platform, log_z=log_z, value_head=value_head)
        stages.append([[_described(*named) for named in module.named_parameters()] for module in model.modules])
        destroy_process_groups()
    return stages


def _main() -> None:
    asked = json.load(sys.stdin)
    architecture, config = Architecture(**asked.pop("architecture")), load_config(sys.argv[1])
    print(_MARK + json.dumps(build_stages(architecture, config, **asked)))


def _described(name: str, parameter: Any) -> dict[str, Any]:
    return {
        "name": name,
        "elements": parameter.numel(),
        "itemsize": parameter.element_size(),
        "shared": bool(getattr(parameter, "shared_embedding", False)),
        "matrix": parameter.dim() == 2 and ".layers." in name and not name.startswith("log_z."),
    }


if __name__ == "__main__":
    _main()
