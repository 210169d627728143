"""Every setting of the program: one frozen dataclass per concern, gathered in `Config`.

The string under a field is its manual: `format_help` prints it. Names and defaults are Megatron-Core's where
it has the setting; where a default differs, the comment above it says why.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict
from pydantic.dataclasses import dataclass

from .objectives import (
    CriticConfig,
    FlowRLConfig,
    LogZConfig,
    ObjectiveConfig,
    PolicyGradientConfig,
    SamplerCorrectionConfig,
)
from .run import (
    EvaluationConfig,
    LoggingConfig,
    PromptsConfig,
    RewardConfig,
    RunConfig,
    SftConfig,
    TrackingConfig,
)
from .strict import STRICT

RecomputeModule = Literal["core_attn", "mlp"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Which model, and where its weights come from."""

    path: str = ""
    """Hugging Face model folder, or a checkpoint of this program. Must be given."""

    init: Literal["pretrained", "random"] = "pretrained"
    """Weights: `pretrained` reads them from the folder; `random` draws them from `seed` and needs only
    config.json."""

    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size."""

    max_sequence_length: PositiveInt | None = None
    """Longest sequence accepted, in tokens; longer ones are refused. null: the model's own limit."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How the model and the data are cut over ranks. Data-parallel size is world size / (TP x PP x CP)."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every weight matrix (TP)."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages, each with a run of the layers (PP)."""

    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline stage (VPP, interleaved schedule). null: not interleaved."""

    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of every sequence (CP)."""

    sequence_parallel: bool = False
    """Cut norms and dropout over the tensor-parallel ranks, along the tokens. Needs TP > 1."""

    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Layers on the first pipeline stage. null: an even share."""

    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Layers on the last pipeline stage. null: an even share."""

    distributed_timeout_minutes: PositiveInt = 10
    """Minutes a collective may wait for a rank before the run is ended."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistributedDataParallelConfig:
    """How data-parallel ranks share gradients and optimizer states in training (Megatron's DDP)."""

    # Megatron: False. On here because replicated Adam states take 12 bytes a parameter on every rank.
    use_distributed_optimizer: bool = True
    """Cut optimizer states over the data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients, bucket by bucket, while the backward pass still runs."""

    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs. Needs use_distributed_optimizer and
    overlap_grad_reduce."""

    bucket_size: PositiveInt | None = None
    """Elements in a gradient bucket, for overlap_grad_reduce. null: max(40000000, 1000000 x data-parallel
    size)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrecisionConfig:
    """Number formats of weights and matrix products. FP8 is Transformer Engine's on a GPU, and emulated on a CPU."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Format of weights and activations."""

    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 matrix products: `e4m3` throughout, or `hybrid` with e5m2 for output gradients. null: none."""

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """FP8 scales from the present tensor, block, or 32-element block (Blackwell); or delayed: from past maxima, with
    which log-probs depend on the passes before, and importance weights are not 1 on-policy."""

    fp8_margin: NonNegativeInt = 0
    """Delayed recipe: powers of two of head-room in the scale."""

    fp8_amax_history_len: PositiveInt = 1
    """Delayed recipe: steps of maxima remembered."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Delayed recipe: which remembered maximum sets the scale."""

    fp8_param_gather: bool = False
    """Keep matrix weights in FP8, and gather them over data-parallel ranks in FP8."""

    first_last_layers_bf16: bool = False
    """Keep the first and last layers in bfloat16. Not with the delayed recipe."""

    num_layers_at_start_in_bf16: NonNegativeInt = 1
    """First layers kept in bfloat16, with first_last_layers_bf16."""

    num_layers_at_end_in_bf16: NonNegativeInt = 1
    """Last layers kept in bfloat16, with first_last_layers_bf16."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecomputeConfig:
    """Activations computed again in the backward pass instead of being kept."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """What is recomputed: the modules of recompute_modules, or whole layers. null: nothing."""

    recompute_method: Literal["uniform", "block"] | None = None
    """Full only. `uniform` keeps the input of every recompute_num_layers layers; `block` recomputes the first
    recompute_num_layers layers of each pipeline stage."""

    recompute_num_layers: PositiveInt | None = None
    """Full only: layers in a recomputed unit (uniform), or recomputed per pipeline stage (block)."""

    # Megatron's `layernorm` is left out: Transformer Engine fuses a dense layer's norms into its linears, so
    # nothing is left to recompute. The other modules belong to MoE and latent attention.
    recompute_modules: Annotated[tuple[RecomputeModule, ...], Strict(False), Field(min_length=1)] = ("core_attn",)
    """Selective only: the modules recomputed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW."""

    # Megatron has no default; FlowRL's published recipe.
    lr: NonNegativeFloat = 1e-6
    """Learning rate."""

    # Megatron: 0.01; FlowRL's published recipe.
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay: each step takes lr x weight_decay of the weight."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean of gradients."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the running mean of squared gradients."""

    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the mean square."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest global L2 norm of the gradient. 0: no clipping."""

    # Megatron: linear, with a length that is always given. FlowRL's published recipe is constant after the warm-up.
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""

    # Megatron: 0; FlowRL's published recipe.
    lr_warmup_iters: NonNegativeInt = 10
    """Steps over which the learning rate rises from lr / lr_warmup_iters to lr; a step is one rollout and its
    updates."""

    lr_decay_iters: PositiveInt | None = None
    """Step at which a linear or cosine course reaches min_lr, the warm-up included. Must be given for them."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a linear or cosine course."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Text, tokens and packing."""

    tokens_per_micro_batch: PositiveInt = 16384
    """Token budget of one packed micro-batch, summed over the context-parallel ranks. A longer sequence is
    refused."""

    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Folder of the Hugging Face tokenizer, for text input. null: model.path."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogProbConfig:
    """Log-probabilities of the tokens."""

    temperature: PositiveFloat = 1.0
    """Logits are divided by this."""

    chunk_bytes: Annotated[int, Field(ge=2**20)] | None = None
    """Working memory of the computation over the vocabulary, in bytes. null: 64 MiB on a CPU, 256 MiB on a GPU."""

    entropy: bool = False
    """Also compute the entropy at every token."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceConfig:
    """The frozen reference model."""

    placement: Literal["resident", "host"] = "resident"
    """Where its weights wait: `resident` on the device beside the policy's; `host` in host memory, exchanged
    with the policy's for each reference pass."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    """vLLM servers, which sample the answers, and how weights get to them."""

    servers: PositiveInt = 1
    """Servers (replicas) on this machine."""

    tensor_parallel_size: PositiveInt = 1
    """Workers that share the weights of one server."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address the servers listen on. The routes that update weights know no authentication: the loopback, or a
    private network."""

    first_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of the first server; the others follow. null: ports that are free."""

    first_gpu: NonNegativeInt = 0
    """The first server's first GPU among those visible; each server takes tensor_parallel_size. Not on a CPU."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Format of the sampler's weights and activations. On a CPU, float32: bfloat16 may end a worker there."""

    # vLLM's names. Both are made from the bfloat16 weights of every update, layer by layer, as these arrive.
    quantization: Literal["fp8_per_tensor", "fp8_per_block"] | None = None
    """Matrix products in FP8, on GPUs: a scale for each weight, or for each 128 x 128 of its numbers (and 128 of an
    activation's). null: in dtype."""

    max_model_len: PositiveInt | None = None
    """Longest prompt and answer together, in tokens. null: the model's own limit."""

    max_num_seqs: PositiveInt = 256
    """Answers that a server works on at once; no more than a few are sent ahead of it."""

    cpu_kv_cache_gib: PositiveInt = 4
    """Memory of a server's key-value cache on a CPU, in GiB. On a GPU it is vLLM's --gpu-memory-utilization."""

    transfer: Literal["shm", "gloo", "disk", "nccl", "ipc"] | None = None
    """How weights get to the servers. On a CPU: `shm` through memory (one machine), `gloo` over TCP. On GPUs: `nccl` to
    GPUs of the servers' own, `ipc` to GPUs shared with the trainer. `disk`, everywhere: an exported folder. null: shm
    on a CPU; on GPUs ipc when colocated, else nccl."""

    transfer_folder: Annotated[str, Field(min_length=1)] | None = None
    """disk only: folder for the exported weights, on a file system that the servers share. null: the system's folder
    for temporary files."""

    transfer_timeout_seconds: PositiveFloat = 300.0
    """How long a server may take for any step of a weight update."""

    colocated: bool = False
    """The servers share their GPUs with the trainer, and sleep while it trains. On a CPU nothing has to sleep."""

    start_timeout_seconds: PositiveFloat = 600.0
    """How long a server may take to become ready."""

    max_restarts: NonNegativeInt = 3
    """How often in a row, without an answer in between, a server that fails is started again."""

    hang_seconds: NonNegativeFloat | None = None
    """How long a server that was asked for answers may go without making or reading a token: then its prompts go
    elsewhere, and it is ended and started again; those of generation.urls by the `serve` that they are of. null: 90 on
    GPUs, 600 on CPUs. 0: for ever."""

    replay: Annotated[str, Field(min_length=1)] | None = None
    """Folder of recorded rollouts, RUN/rollouts of some run, to train on instead of sampling: no server is started."""

    keep_records: PositiveInt | None = None
    """Steps whose rollouts are kept in run.folder once a later checkpoint is whole. null: all."""

    extra_arguments: Annotated[tuple[str, ...], Strict(False)] = ()
    """Further arguments of vLLM's server, as they stand on its command line."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerationConfig:
    """Answers for training: sampled at log_prob.temperature, from the whole vocabulary."""

    n: PositiveInt = 8
    """Answers to each prompt."""

    max_tokens: PositiveInt = 1024
    """Longest answer, in tokens."""

    seeded: bool = False
    """Give every answer a seed of its own, from `seed`, its prompt and its number: repeatable as far as the sampler's
    arithmetic is, and slower."""

    urls: Annotated[tuple[str, ...], Strict(False)] = ()
    """Addresses of servers that run already (megatron-flowrl serve). None: servers are started here."""

    in_flight_at_sync: Literal["finish", "abort"] = "finish"
    """Answers that are being sampled when new weights come: `finish` waits for them, `abort` stops them, keeps what
    they have, and goes on from there with the new weights."""

    request_timeout_seconds: PositiveFloat = 1800.0
    """How long one answer may take."""

    max_retries: NonNegativeInt = 3
    """How often an answer is asked for again when its server fails."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Saving the state of training, and going on from it."""

    save: Annotated[str, Field(min_length=1)] | None = None
    """Folder of the run's checkpoints, on a file system that all nodes share. A start goes on from the newest good
    one in it. null: the folder `checkpoints` in run.folder."""

    save_interval: PositiveInt = 10
    """Steps between two checkpoints."""

    async_save: bool = True
    """Go on training while a checkpoint is written. Meanwhile host memory holds what is written: on a GPU all of it, on
    a CPU what training changes."""

    keep_last: PositiveInt = 3
    """Checkpoints kept; older ones are deleted when a new one is whole."""

    keep_best: bool = True
    """Save also after an evaluation with the best reward so far, and keep that one whatever its age."""

    write_timeout_seconds: PositiveFloat = 1800.0
    """How long training waits for a checkpoint that is being written: when the next one is due, at the end, and without
    async_save. Then its writers are ended, that checkpoint is given up, and training goes on."""

    last_save_seconds: NonNegativeFloat = 300.0
    """How long the checkpoint that a run ends with is tried again where it cannot be written, as on a full disk; 30 at
    most where the run was asked to end."""

    verify_checksums: bool = True
    """Read every file of a checkpoint for its SHA-256 before loading it. false: only sizes are compared."""

    load_optim: bool = True
    """Load the optimizer's state, and stop where a checkpoint has none. false: begin with a fresh optimizer."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """All settings of a run."""

    # Below 2**32, the range that NumPy's seeding accepts.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """All randomness derives from it; so do the weights when model.init is random."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    ddp: DistributedDataParallelConfig = DistributedDataParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    flowrl: FlowRLConfig = FlowRLConfig()
    log_z: LogZConfig = LogZConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    critic: CriticConfig = CriticConfig()
    sampler_correction: SamplerCorrectionConfig = SamplerCorrectionConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    data: DataConfig = DataConfig()
    log_prob: LogProbConfig = LogProbConfig()
    reference: ReferenceConfig = ReferenceConfig()
    rollout: RolloutConfig = RolloutConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sft: SftConfig = SftConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    logging: LoggingConfig = LoggingConfig()
