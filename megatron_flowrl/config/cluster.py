"""How many nodes a run takes: what trains on them, and what serves."""

from dataclasses import dataclass

from .checks import data_parallel_size
from .errors import UserError
from .schema import Config


@dataclass(frozen=True)
class Sizes:
    """Nodes that train, and that serve vLLM and do nothing else; ranks on a node that trains."""

    training: int
    serving: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Of the allocation."""
        return self.training + self.serving


def sizes_of(config: Config, per_node: int, nodes: int | None, serving: int) -> Sizes:
    """Where `nodes` is None, as few nodes as the layout takes. Raises UserError for what does not fit."""
    parallel = config.parallel
    replica = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )  # fmt: skip
    if parallel.tensor_model_parallel_size > per_node:
        raise UserError(
            f"parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size} is more than the {per_node} "
            "GPUs of a node, and tensor parallelism between nodes is slower than anything else; lower it"
        )
    if per_node % parallel.tensor_model_parallel_size:
        raise UserError(
            f"parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size} does not divide the "
            f"{per_node} GPUs of a node: some groups would lie on two nodes; change one of them"
        )
    training = nodes if nodes is not None else -(-replica // per_node)
    if training < 1 or serving < 0:
        raise UserError(f"--nodes {nodes} and --sampler-nodes {serving} cannot be: one node at least trains")
    replicas = data_parallel_size(parallel, training * per_node)
    if config.run.prompts_per_mini_batch * config.generation.n < replicas:
        raise UserError(
            f"run.prompts_per_mini_batch = {config.run.prompts_per_mini_batch} with generation.n = "
            f"{config.generation.n} answers are fewer than the {replicas} data-parallel ranks; take fewer nodes"
        )
    if serving and config.rollout.replay is not None:
        raise UserError("--sampler-nodes serve vLLM, and rollout.replay needs none; leave one of them out")
    if serving and config.rollout.colocated:
        raise UserError("--sampler-nodes have GPUs of their own: set rollout.colocated=false, or leave them out")
    sampled = config.rollout.replay is None and not config.generation.urls
    if not serving and sampled and not config.rollout.colocated:
        raise UserError(
            f"all {training * per_node} GPUs train and none samples: give --sampler-nodes, or rollout.colocated=true "
            "for vLLM on the GPUs that train"
        )
    used = config.rollout.servers * config.rollout.tensor_parallel_size
    if (serving or (config.rollout.colocated and sampled)) and used > per_node:
        raise UserError(
            f"rollout.servers = {config.rollout.servers} with rollout.tensor_parallel_size = "
            f"{config.rollout.tensor_parallel_size} take {used} GPUs, and a node has {per_node}; lower one of them"
        )
    return Sizes(training, serving, per_node)
