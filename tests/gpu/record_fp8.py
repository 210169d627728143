"""Records what Transformer Engine's linear layer makes of given numbers in FP8, for what emulates it elsewhere.

    python -m tests.gpu.record_fp8 OUT.safetensors

For each recipe and format: a layer without bias, two steps, the second with other numbers (delayed scaling takes its
scales from the first): output y, gradients dx and dw. And of each recipe's own quantisation: bytes and inverse scales.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from safetensors.torch import save_file
from transformer_engine.common import recipe as recipes

from tests.ops.fp8_numbers import IN, OUT, compact, numbers

_FORMATS = {"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}


def recipe_of(name: str, form: str) -> Any:
    """As Megatron makes them."""
    if name == "delayed":
        return recipes.DelayedScaling(margin=0, fp8_format=_FORMATS[form], amax_history_len=1)
    if name == "tensorwise":
        return recipes.Float8CurrentScaling(fp8_format=_FORMATS[form])
    return recipes.Float8BlockScaling(fp8_format=_FORMATS[form])


def products(name: str, form: str) -> dict[str, torch.Tensor]:
    """Two steps of a layer."""
    layer = te.Linear(IN, OUT, bias=False, params_dtype=torch.bfloat16, device="cuda")
    found = {}
    for step in range(2):
        given = {key: value.cuda() for key, value in numbers(step).items()}
        with torch.no_grad():
            layer.weight.copy_(given["w"])
        x = given["x"].clone().requires_grad_()
        layer.weight.grad = None
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe_of(name, form)):
            y = layer(x)
        y.backward(given["dy"])
        found |= {f"{step}.y": y, f"{step}.dx": x.grad, f"{step}.dw": layer.weight.grad}
    return {f"{name}.{form}.{key}": value.detach().float().cpu() for key, value in found.items()}


def quantised() -> dict[str, torch.Tensor]:
    """Bytes and inverse scales of x, by tensor and by block."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    found = {}
    x = numbers(0)["x"].cuda()
    for name, kind in (("e4m3", tex.DType.kFloat8E4M3), ("e5m2", tex.DType.kFloat8E5M2)):
        tensor = Float8CurrentScalingQuantizer(kind, device=torch.device("cuda"))(x)
        found |= {
            f"quantised.tensorwise.{name}.data": tensor._data,
            f"quantised.tensorwise.{name}.inverse": tensor._scale_inv,
        }
        for dims in (1, 2):
            quantizer = Float8BlockQuantizer(
                kind, rowwise=True, columnwise=True, force_pow_2_scales=True, amax_epsilon=0.0, block_scaling_dim=dims
            )
            tensor = quantizer(x)
            for side in ("rowwise", "columnwise"):
                found[f"quantised.block{dims}.{name}.{side}.data"] = getattr(tensor, f"_{side}_data")
                found[f"quantised.block{dims}.{name}.{side}.inverse"] = getattr(tensor, f"_{side}_scale_inv")
    return {key: value.contiguous().cpu() for key, value in found.items()}


def main() -> None:
    found: dict[str, torch.Tensor] = {}
    trouble = []
    for form in _FORMATS:
        for name in ("delayed", "tensorwise", "blockwise"):
            try:
                found |= products(name, form)
            except Exception as error:
                trouble.append(f"{name} {form}: {error!r}")
    try:
        found |= quantised()
    except Exception as error:
        trouble.append(f"quantised: {error!r}")
    about = {
        "transformer_engine": version("transformer_engine"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
    products_found, digests = compact(found)
    save_file(products_found, sys.argv[1], metadata=about | digests)
    print(about, len(found), "tensors")
    if trouble:
        sys.exit("\n".join(trouble))


if __name__ == "__main__":
    main()
