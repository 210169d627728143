"""Training in emulated FP8: on-policy as exact as in bf16, on one rank and with every kind of parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_flowrl.cli import main
from tests.distributed.ranks import run_module
from tests.tiny_tasks import save_task
from tests.training.recorded import arguments, metrics_of, write_records

FP8 = {"precision__dtype": "bfloat16", "precision__fp8": "hybrid", "objective__preset": "exact", "run__steps": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_task(tmp_path_factory.mktemp("task"))
    write_records(folder, folder / "records", 2)
    return folder


def first_update(run: Path) -> dict[str, Any]:
    """Exactly on-policy in the first update of every step; of the first step also equal to the reference."""
    lines = metrics_of(run)
    assert [(line["update/first_weight_mean"], line["update/first_weight_max"]) for line in lines] == [(1.0, 1.0)] * 2
    assert lines[0]["update/first_kl_reference"] == 0.0 and lines[0]["update/grad_norm"] > 0
    return lines[0]


@pytest.mark.usefixtures("process_as_it_was")
def test_the_same_numbers_before_and_in_the_update(task: Path) -> None:
    losses = {}
    for recipe in (None, "tensorwise", "blockwise", "mxfp8"):
        given = {**FP8, "precision__fp8_recipe": recipe} if recipe else {**FP8, "precision__fp8": "null"}
        main(arguments(task, task / "records", task / f"run_{recipe}", **given))
        losses[recipe] = first_update(task / f"run_{recipe}")["update/loss"]
    assert len({*losses.values()}) == 4  # every recipe has reached the layers
    assert losses["blockwise"] == pytest.approx(losses[None], rel=0.25)


@pytest.mark.usefixtures("process_as_it_was")
def test_delayed_scales_have_a_history(task: Path) -> None:
    main(arguments(task, task / "records", task / "delayed", **FP8, precision__fp8_recipe="delayed"))
    line = metrics_of(task / "delayed")[0]
    assert line["update/first_kl_old"] != 0.0 or line["update/first_weight_max"] != 1.0


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_delayed_scales_are_common_to_all_replicas(task: Path) -> None:
    """Each layer's update is a collective inside a forward pass: the reference's and the old pass's as well."""
    given = arguments(task, task / "records", task / "dp2", **FP8, precision__fp8_recipe="delayed")
    done = run_module("megatron_flowrl", given, 2)
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(line["update/grad_norm"] > 0 for line in metrics_of(task / "dp2"))


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tp2", {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}),
        ("pp2", {"parallel__pipeline_model_parallel_size": 2, "precision__first_last_layers_bf16": True}),
        ("cp2", {"parallel__context_parallel_size": 2}),
    ],
)
def test_in_a_layout(name: str, settings: dict[str, Any], task: Path) -> None:
    given = arguments(task, task / "records", task / name, **FP8, precision__fp8_recipe="blockwise", **settings)
    done = run_module("megatron_flowrl", given, 2)
    assert done.returncode == 0, done.stdout[-4000:]
    first_update(task / name)
