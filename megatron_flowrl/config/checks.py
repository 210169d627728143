"""Rules that join several settings. Each is Megatron-Core's own, or refuses what could not be honoured."""

import math
import re
from collections.abc import Iterator

from .errors import UserError
from .keys import KEYS, show
from .presets import METHODS, PRESETS
from .schema import Config, ParallelConfig


def check_config(config: Config) -> None:
    """Refuse settings that contradict one another, or that the others leave without effect.

    What depends on the model's shape or on the number of ranks is checked where these are known.

    Raises:
        UserError: with all the problems found.
    """
    rules = (
        _model,
        _pipeline,
        _data_parallel,
        _fp8,
        _bf16_layers,
        _recompute,
        _schedule,
        _run,
        _reference,
        _rollout,
        _objective,
        _log_z,
        _policy_gradient,
        _sampler_correction,
    )
    problems = [problem for rule in rules for problem in rule(config)]
    if problems:
        raise UserError(*problems)


def check_answers(config: Config) -> None:
    """Refuse answers that leave no room for a prompt: of a run, whose answers the configuration has the length of.

    Raises:
        UserError: with all the problems found.
    """
    room = config.rollout.max_model_len
    if config.rollout.replay is not None or room is None:
        return
    lengths = {
        "generation.max_tokens": config.generation.max_tokens,
        "evaluation.max_tokens": config.evaluation.max_tokens,
    }
    problems = [
        f"{key} = {length} leaves no room for a prompt within rollout.max_model_len = {room}; raise that"
        for key, length in lengths.items()
        if length is not None and length >= room
    ]
    if problems:
        raise UserError(*problems)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """World size / (TP x PP x CP).

    Raises:
        UserError: when that is not a whole number.
    """
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes: list[int] = [getattr(parallel, name) for name in names]
    ranks_per_replica = math.prod(sizes)
    if world_size % ranks_per_replica:
        product = " x ".join(f"parallel.{name} {size}" for name, size in zip(names, sizes, strict=True))
        raise UserError(
            f"{world_size} processes cannot be shared out evenly: {product} = {ranks_per_replica}; "
            f"start a multiple of {ranks_per_replica} processes, or change these sizes"
        )
    return world_size // ranks_per_replica


def _model(config: Config) -> Iterator[str]:
    if not config.model.path:
        yield "model.path is empty; give the folder of a Hugging Face model: model.path=FOLDER"


def _pipeline(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel = true needs parallel.tensor_model_parallel_size > 1, which is 1; "
            "raise it, or set parallel.sequence_parallel=false"
        )
    if parallel.pipeline_model_parallel_size == 1:
        yield from _idle(
            config,
            "needs parallel.pipeline_model_parallel_size > 1, which is 1; raise it",
            "parallel.virtual_pipeline_model_parallel_size",
            "parallel.num_layers_in_first_pipeline_stage",
            "parallel.num_layers_in_last_pipeline_stage",
        )
        return
    chunks = parallel.virtual_pipeline_model_parallel_size
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        layers: int | None = getattr(parallel, name)
        if layers and chunks and layers % chunks:
            yield (
                f"parallel.{name} = {layers} must be a multiple of "
                f"parallel.virtual_pipeline_model_parallel_size = {chunks}: the chunks of a stage are equal"
            )


def _data_parallel(config: Config) -> Iterator[str]:
    ddp = config.ddp
    needs = {
        "ddp.overlap_param_gather": ("use_distributed_optimizer", "overlap_grad_reduce"),
        "precision.fp8_param_gather": ("use_distributed_optimizer",),
    }
    for key, names in needs.items():
        for name in names:
            if _value(config, key) and not getattr(ddp, name):
                yield f"{key} = true needs ddp.{name}=true, which is false; set it, or set {key}=false"
    if not ddp.overlap_grad_reduce:
        yield from _idle(
            config,
            "has no effect while ddp.overlap_grad_reduce is false; set that to true",
            "ddp.bucket_size",
        )


def _fp8(config: Config) -> Iterator[str]:
    precision = config.precision
    names = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
    delayed_keys = [f"precision.{name}" for name in names]
    if precision.fp8 is None:
        yield from _idle(
            config,
            "has no effect while precision.fp8 is null; set precision.fp8=hybrid or e4m3",
            "precision.fp8_recipe",
            *delayed_keys,
            "precision.fp8_param_gather",
            "precision.first_last_layers_bf16",
        )
        return
    if precision.dtype == "float32":
        yield (
            f"precision.fp8 = {precision.fp8} needs precision.dtype=bfloat16, which is float32; "
            "set it, or set precision.fp8=null"
        )
    if precision.fp8_recipe != "delayed":
        yield from _idle(config, _read_only_with("precision.fp8_recipe", "delayed", config), *delayed_keys)
    elif precision.first_last_layers_bf16:
        yield (
            "precision.first_last_layers_bf16 = true does not go with precision.fp8_recipe = delayed; "
            "take the tensorwise, blockwise or mxfp8 recipe, or set precision.first_last_layers_bf16=false"
        )


def _bf16_layers(config: Config) -> Iterator[str]:
    if not config.precision.first_last_layers_bf16:
        yield from _idle(
            config,
            "has no effect while precision.first_last_layers_bf16 is false; set that to true",
            "precision.num_layers_at_start_in_bf16",
            "precision.num_layers_at_end_in_bf16",
        )


def _schedule(config: Config) -> Iterator[str]:
    settings, style = config.optimizer, f"optimizer.lr_decay_style = {config.optimizer.lr_decay_style}"
    if settings.lr_decay_style == "constant":
        yield from _idle(
            config,
            "has no effect while optimizer.lr_decay_style is constant; set that to linear or cosine",
            "optimizer.lr_decay_iters",
            "optimizer.min_lr",
        )
        return
    if settings.lr_decay_iters is None:
        yield f"{style} needs optimizer.lr_decay_iters, which is null; set it to the number of steps"
    elif settings.lr_decay_iters <= settings.lr_warmup_iters:
        yield (
            f"optimizer.lr_decay_iters = {settings.lr_decay_iters} must be above optimizer.lr_warmup_iters = "
            f"{settings.lr_warmup_iters}: it counts the warm-up too"
        )
    elif settings.min_lr == 0 and config.run.steps > settings.lr_decay_iters:
        yield (
            f"run.steps = {config.run.steps}: from step {settings.lr_decay_iters} on the learning rate is 0; give "
            f"optimizer.min_lr, or set optimizer.lr_decay_iters={config.run.steps}"
        )
    if settings.min_lr > settings.lr:
        yield f"optimizer.min_lr = {settings.min_lr} is above optimizer.lr = {settings.lr}; lower it"


def _run(config: Config) -> Iterator[str]:
    run = config.run
    if run.prompts_per_step % run.prompts_per_mini_batch:
        yield (
            f"run.prompts_per_step = {run.prompts_per_step} is no multiple of run.prompts_per_mini_batch = "
            f"{run.prompts_per_mini_batch}: a step's prompts are shared out to whole updates; change one of them"
        )
    minutes = config.parallel.distributed_timeout_minutes
    if run.hang_seconds is not None and run.hang_seconds >= 60 * minutes:
        yield (
            f"run.hang_seconds = {run.hang_seconds:g} is not below parallel.distributed_timeout_minutes = {minutes}, "
            "after which a collective ends by itself: lower it, or raise that"
        )
    template = config.prompts.template
    if template is not None and template.count("{prompt}") != 1:
        yield f"prompts.template = {show(template)} must have {{prompt}} in it, once: there the prompt goes"


def _rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.first_port is not None and rollout.first_port + rollout.servers - 1 > 65535:
        yield (
            f"rollout.first_port = {rollout.first_port} leaves no port for the last of rollout.servers = "
            f"{rollout.servers}: ports end at 65535; lower one of them"
        )
    limit = config.parallel.distributed_timeout_minutes * 60 / 2
    if rollout.transfer_timeout_seconds > limit:
        yield (
            f"rollout.transfer_timeout_seconds = {rollout.transfer_timeout_seconds:g} is above {limit:g}, half of "
            "parallel.distributed_timeout_minutes, in which the other ranks give up on a transfer; "
            "lower it or raise that"
        )
    if rollout.transfer == "ipc" and not rollout.colocated:
        yield (
            "rollout.transfer = ipc needs rollout.colocated=true, which is false: it is for GPUs that servers share "
            "with the trainer; set that, or rollout.transfer=nccl"
        )
    if rollout.transfer == "nccl" and rollout.colocated:
        yield (
            "rollout.transfer = nccl does not go with rollout.colocated = true: NCCL does not connect two processes "
            "on one GPU; set rollout.transfer=ipc or rollout.colocated=false"
        )
    if rollout.transfer != "disk":
        yield from _idle(config, _read_only_with("rollout.transfer", "disk", config), "rollout.transfer_folder")
    if rollout.replay is not None:  # what describes the sampler may stay: a recipe is replayed as it is
        yield from _idle(
            config,
            "has no effect with rollout.replay, which starts and asks no server; leave one of the two out",
            "rollout.hang_seconds",
            "rollout.max_restarts",
            "generation.urls",
        )
    if rollout.quantization is not None and rollout.dtype == "float32":
        yield (
            f"rollout.quantization = {rollout.quantization} needs rollout.dtype=bfloat16, which is float32; set it, "
            "or set rollout.quantization=null"
        )
    if config.generation.urls:
        names = (
            "servers", "tensor_parallel_size", "host", "first_port", "first_gpu", "cpu_kv_cache_gib", "quantization",
        )  # fmt: skip
        yield from _idle(
            config,
            "has no effect while generation.urls names servers that run already; leave one of the two out",
            *(f"rollout.{name}" for name in (*names, "extra_arguments")),
        )
    for url in config.generation.urls:
        if not re.fullmatch(r"http://[^/\s:]+:\d+/?", url):
            yield f"generation.urls: {url!r} is not an address such as http://127.0.0.1:8000"
    if len({url.rstrip("/") for url in config.generation.urls}) < len(config.generation.urls):
        yield f"generation.urls names a server twice: {', '.join(config.generation.urls)}; keep one"


def _objective(config: Config) -> Iterator[str]:
    objective, flowrl = config.objective, config.flowrl
    if objective.name not in METHODS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", objective.name):
        yield (
            f"objective.name = {show(objective.name)} is none of {', '.join(METHODS)}, nor a dotted path such as "
            "package.module.factory"
        )
    limit = config.generation.max_tokens
    if objective.overlong_buffer is not None and objective.overlong_buffer > limit:
        yield (
            f"objective.overlong_buffer = {objective.overlong_buffer} is above generation.max_tokens = {limit}: "
            "it is the end of the longest answer; lower it"
        )
    if flowrl.length_normalization != "residual":
        yield from _idle(
            config, _read_only_with("flowrl.length_normalization", "residual", config), "flowrl.length_exponent"
        )
    if flowrl.importance_clip != "max":
        yield from _idle(config, _read_only_with("flowrl.importance_clip", "max", config), "flowrl.importance_max")
    if flowrl.importance_clip != "two_sided":
        yield from _idle(
            config,
            _read_only_with("flowrl.importance_clip", "two_sided", config),
            "flowrl.importance_clip_low",
            "flowrl.importance_clip_high",
        )


def _log_z(config: Config) -> Iterator[str]:
    if config.flowrl.log_z != "mlp":
        yield from _idle(
            config,
            _read_only_with("flowrl.log_z", "mlp", config),
            *(f"log_z.{name}" for name in ("lr", "weight_decay", "detach")),
        )


def _policy_gradient(config: Config) -> Iterator[str]:
    name, settings = config.objective.name, config.policy_gradient
    if name not in METHODS:
        return  # the user's own reads what it likes
    if name == "flowrl":
        reason = "has no effect with objective.name=flowrl; name the method it is for"
        yield from _idle(config, reason, *_keys_of("policy_gradient"), *_keys_of("critic"))
        return
    if name != "gflownet_ppo":
        preset = PRESETS[config.objective.preset]
        for key in _keys_of("flowrl"):
            if _value(config, key) != preset.get(key, KEYS[key].default):
                yield f"{key} = {show(_value(config, key))} has no effect with objective.name={name}; leave it out"
        reason = f"has no effect with objective.name={name}; set objective.name=gflownet_ppo"
        yield from _idle(config, reason, "policy_gradient.balance_coef")
    if settings.advantage not in ("reinforce_plus_plus", "gae"):
        reason = (
            "is read only with policy_gradient.advantage=reinforce_plus_plus or gae, which is "
            f"{settings.advantage}; change that"
        )
        yield from _idle(config, reason, "policy_gradient.kl_in_reward", "policy_gradient.discount")
    if settings.advantage != "gae":
        reason = _read_only_with("policy_gradient.advantage", "gae", config)
        yield from _idle(config, reason, "policy_gradient.gae_lambda", *_keys_of("critic"))


def _sampler_correction(config: Config) -> Iterator[str]:
    settings = config.sampler_correction
    if settings.level is None:
        yield from _idle(
            config,
            "has no effect while sampler_correction.level is null; set that to token or sequence",
            *(f"sampler_correction.{name}" for name in ("mode", "maximum", "minimum")),
        )
        return
    if settings.mode != "mask":
        reason = _read_only_with("sampler_correction.mode", "mask", config)
        yield from _idle(config, reason, "sampler_correction.minimum")
    if settings.minimum >= settings.maximum:
        yield (
            f"sampler_correction.minimum = {settings.minimum} must be below sampler_correction.maximum = "
            f"{settings.maximum}"
        )


def _recompute(config: Config) -> Iterator[str]:
    granularity, granularity_key = config.recompute.recompute_granularity, "recompute.recompute_granularity"
    layer_keys = ("recompute.recompute_method", "recompute.recompute_num_layers")
    if granularity == "full":
        for key in layer_keys:
            if _value(config, key) is None:
                allowed = KEYS[key].allowed.removesuffix(" or null")
                yield f"{granularity_key} = full needs {key}, which is null; set it to {allowed}"
    else:
        yield from _idle(config, _read_only_with(granularity_key, "full", config), *layer_keys)
    if granularity != "selective":
        reason = _read_only_with(granularity_key, "selective", config)
        yield from _idle(config, reason, "recompute.recompute_modules")


def _reference(config: Config) -> Iterator[str]:
    if config.reference.placement == "host" and config.precision.fp8_param_gather:
        yield (
            "reference.placement = host does not go with precision.fp8_param_gather = true: FP8 weights are "
            "not exchanged bit for bit; set reference.placement=resident or precision.fp8_param_gather=false"
        )
    elif config.reference.placement == "host" and config.precision.fp8 and config.precision.fp8_recipe == "delayed":
        yield (
            "reference.placement = host does not go with precision.fp8_recipe = delayed: the reference's passes would "
            "enter the history that the policy's scales come from; set precision.fp8_recipe=blockwise "
            "or reference.placement=resident"
        )


def _idle(config: Config, reason: str, *keys: str) -> Iterator[str]:
    """A problem for each of `keys` that differs from its default though nothing would read it."""
    for key in keys:
        value, default = _value(config, key), KEYS[key].default
        if value != default:
            yield f"{key} = {show(value)} {reason}, or set {key}={show(default)}"


def _keys_of(section: str) -> list[str]:
    return [key for key in KEYS if key.startswith(f"{section}.")]


def _read_only_with(key: str, value: str, config: Config) -> str:
    return f"is read only with {key}={value}, which is {show(_value(config, key))}; change that"


def _value(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
