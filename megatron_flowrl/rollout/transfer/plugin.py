"""What vLLM loads from this package by the entry point `vllm.general_plugins`: the names of our transfer engines.

vLLM calls `register` in its front end, its engine core and its workers, sometimes twice in a process. Nothing else of
this package is imported here: these processes must never see what the trainer needs on a CPU.
"""

from __future__ import annotations

ENGINES = {
    "shm": "ShmWeightTransferEngine",
    "gloo": "GlooWeightTransferEngine",
    "disk": "DiskWeightTransferEngine",
}


def register() -> None:
    """Make `--weight-transfer-config '{"backend": "shm"}'` and the others known to vLLM; safe to call twice."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory

    for backend, name in ENGINES.items():
        if backend not in Factory._registry:  # vLLM has no public question for it, and refuses a second registration
            Factory.register_engine(backend, "megatron_flowrl.rollout.transfer.worker", name)
