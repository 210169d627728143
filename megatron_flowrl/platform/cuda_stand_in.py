"""What Megatron-Core needs of `torch.cuda` on a machine without a GPU.

Megatron-Core asks CUDA for a device, a stream or a generator in places where any device would do. Where no GPU
is visible, `install()` answers those calls on the CPU, so that the same Megatron code runs over gloo. Nothing here
changes a number: streams and events order work that on a CPU is ordered already.

What is replaced, and why:

1. Functions and classes of `torch.cuda` (`_TORCH_CUDA`). On a machine without a GPU each of them raises, so no
   program can depend on what it did before.
2. `Tensor.cuda` and `Module.cuda`: return the object itself, it is where it has to be.
3. The name `torch` *inside the Megatron modules that write `device="cuda"`* (`_MODULES_NAMING_CUDA`): a view of
   torch whose factory functions read "cuda" as "cpu". torch itself is left alone for everybody else.
4. `megatron.core.tensor_parallel.random._get/_set_cuda_rng_state`: the CPU generator.
5. `megatron.core.jit.jit_fuser`: what Megatron imports from here on is not compiled, which on a CPU costs minutes and
   gains nothing. (The fusions are off on a CPU: none that was imported before is called.)
6. `Tensor.type()`, only while an optimizer of Megatron is being built or clips gradients: it compares the name of
   a tensor's type with "torch.cuda.FloatTensor".
7. `megatron.core.optimizer`'s choice of Adam: torch's, also where Transformer Engine or Apex are installed and the GPU
   is hidden. Theirs runs on a GPU only.

`install()` refuses to run beside a GPU, may be called twice, and `uninstall()` puts everything back. vLLM must never
see any of this: its workers are other processes, and nothing here reaches a process that is spawned.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
_MODULES_NAMING_CUDA = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
)

_undo: list[Callable[[], None]] = []


class _Stream:
    """A CUDA stream where there is only one order of things: the program's."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_THE_STREAM = _Stream()


def _returning(value: Any) -> Callable[..., Any]:
    """A new function every time: torch.compile refuses one function under two names."""

    def answer(*_: Any, **__: Any) -> Any:
        return value

    return answer


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


_TORCH_CUDA: dict[str, Any] = {
    "Event": _Event,
    "Stream": _Stream,
    "current_device": _returning(_CPU),
    "current_stream": _returning(_THE_STREAM),
    "default_stream": _returning(_THE_STREAM),
    "empty_cache": _returning(None),
    "get_rng_state": _get_rng_state,
    "manual_seed": _manual_seed,
    "max_memory_allocated": _returning(0),
    "memory_allocated": _returning(0),
    "memory_reserved": _returning(0),
    "memory_stats": _returning({}),
    "set_device": _returning(None),
    "set_rng_state": _set_rng_state,
    "set_stream": _returning(None),
    "stream": _returning(contextlib.nullcontext()),
    "synchronize": _returning(None),
}


class _TorchReadingCudaAsCpu(types.ModuleType):
    """`torch`, but its factory functions take `device="cuda"` for the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _reading_cuda_as_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _reading_cuda_as_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device=_CPU if str(device).startswith("cuda") else device, **kwargs)

    return on_cpu


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    original = torch.Tensor.type

    def named_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = named_as_on_cuda  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapper


def _replace(owner: Any, name: str, value: Any) -> None:
    existed, original = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, original) if existed else delattr(owner, name))


def is_installed() -> bool:
    """Whether Megatron's CUDA calls are answered on the CPU at present."""
    return bool(_undo)


def install() -> None:
    """Answer Megatron-Core's CUDA calls on the CPU. Raises RuntimeError where a GPU is visible."""
    if torch.cuda.is_available():
        raise RuntimeError("a GPU is visible: Megatron's CUDA calls must not be answered on the CPU")
    if is_installed():
        return
    try:
        _replace_all()
    except BaseException:
        uninstall()
        raise


def _replace_all() -> None:
    for name, value in _TORCH_CUDA.items():
        _replace(torch.cuda, name, value)
    _replace(torch.Tensor, "cuda", lambda self, *_, **__: self)
    _replace(torch.nn.Module, "cuda", lambda self, *_, **__: self)

    # Megatron is imported only now: some of its modules take functions of torch.cuda by name, and most of its fusions
    # compile themselves when they are imported.
    jit = importlib.import_module("megatron.core.jit")
    _replace(jit, "jit_fuser", jit.noop_decorator)
    torch_view = _TorchReadingCudaAsCpu()
    for name in _MODULES_NAMING_CUDA:
        _replace(importlib.import_module(name), "torch", torch_view)
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _replace(random, "_get_cuda_rng_state", _get_rng_state)
    _replace(random, "_set_cuda_rng_state", _set_rng_state)
    optimizers = importlib.import_module("megatron.core.optimizer")
    _replace(optimizers, "Adam", torch.optim.AdamW)
    _replace(optimizers, "USING_PYTORCH_OPTIMIZER", True)
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    for optimizer_class in (optimizer.Float16OptimizerWithFloat16Params, distributed):
        _replace(optimizer_class, "__init__", _with_cuda_type_names(optimizer_class.__init__))
    clip = "clip_grad_by_total_norm_fp32"
    _replace(optimizer, clip, _with_cuda_type_names(getattr(optimizer, clip)))


def uninstall() -> None:
    """Put back all that `install` replaced."""
    while _undo:
        _undo.pop()()
