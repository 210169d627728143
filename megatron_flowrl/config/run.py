"""Settings of a training run: its size, prompts, rewards, evaluation, supervised warm start, and what it shows."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, Strict
from pydantic.dataclasses import dataclass

from .strict import STRICT

NonEmpty = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """A training run."""

    folder: str = ""
    """Folder of all that the run writes: checkpoints, rollouts, metrics, logs; on a file system that all nodes share.
    Must be given. A start goes on from what is there."""

    steps: PositiveInt = 200
    """Steps of the whole run: a rollout and its updates each; with sft, an update each."""

    prompts_per_step: PositiveInt = 512
    """Prompts of a rollout."""

    prompts_per_mini_batch: PositiveInt = 32
    """Prompts whose answers make one update; prompts_per_step is a multiple of it."""

    hang_seconds: Annotated[float, Field(ge=0)] | None = None
    """Seconds in which a step's passes and updates may show no progress (a micro-batch, a pass or an update that is
    over; in the first step four times as long); after them where every rank stands is written to run.folder/logs, and
    the run is ended, for a cluster to start it anew. null: on CPUs four fifths of
    parallel.distributed_timeout_minutes, after which collectives end without such words; on GPUs that, and at most 90:
    give more where a micro-batch takes longer. A process that stands still as a whole ends the run after a minute,
    whatever this is. 0: nothing of this."""

    slow_step_factor: Annotated[float, Field(gt=1)] = 10.0
    """The same where these take so many times their median, and a minute or more."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptsConfig:
    """The prompts that are trained on, and how rows of a data set become prompts."""

    path: str = ""
    """JSONL or Parquet file, a folder of such files, or the name of a data set on the Hugging Face hub (which needs the
    network). Must be given."""

    split: NonEmpty = "train"
    """Split of a data set of the hub."""

    prompt_column: NonEmpty = "prompt"
    """Column of the prompt: text, chat messages ({"role", "content"}), or token ids."""

    ground_truth_column: NonEmpty | None = None
    """Column that the grader is given. null: reward_model.ground_truth, ground_truth or answer, whichever is there."""

    template: NonEmpty | None = None
    """Text around a prompt of text, with {prompt} where it goes. null: the text alone."""

    chat: bool = False
    """Make a prompt of text a user's message in the tokenizer's chat template. Chat messages always are."""

    max_tokens: PositiveInt = 2048
    """Longer prompts are left out, and counted."""

    limit: PositiveInt | None = None
    """Rows to read, from the first. null: all."""

    shuffle: bool = True
    """Another order in every epoch, from `seed`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CodeConfig:
    """Answers that are programs: what each may take, and where it runs. For the grader `code`."""

    score: Literal["all", "fraction"] = "all"
    """`all`: 1 where all tests are passed, else 0; `fraction`: the share that is passed."""

    cpu_seconds: PositiveFloat = 5.0
    """Processor time of a program, in a test; of a function, in all calls the same for each of them."""

    wall_seconds: PositiveFloat = 8.0
    """Time of a program in a test, or of a call of a function. reward.timeout_seconds is for all tests of an answer,
    and has to be longer: raise it where problems have many."""

    memory_mib: Annotated[int, Field(ge=64)] = 1024
    """Memory of a program."""

    processes: PositiveInt = 16
    """Processes and threads of a program."""

    readable: Annotated[tuple[str, ...], Strict(False)] = ()
    """Absolute paths of folders that programs may read, and import from, beside Python's standard library."""

    packages: Annotated[tuple[str, ...], Strict(False)] = ()
    """Packages of this environment that programs and tests may import, such as numpy; and what these import themselves.
    With reward.code.unprotected, and no namespaces, they can read all packages."""

    unprotected: bool = False
    """Run programs where the machine has no namespaces to hold them: they can then reach its network, end its
    processes, and outlive their test."""

    server: NonEmpty | None = None
    """Address of a server with SandboxFusion's /run_code: programs run there, and not here."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    """What an answer is worth. Grading runs in processes of its own, while answers are still being sampled."""

    grader: NonEmpty = "math"
    """`math`: math-verify; `answer_match`: text after `Answer:`; `exact`, `choice`, `regex`: text; `countdown`: an
    expression that has to reach a number; `reasoning_gym`: the task's own; `code`: tests; `remote`: a server's; or a
    function of yours as package.module.function, see megatron_flowrl/rewards/grader.py. A weighted sum of several, also
    of `format` and `overlong`, is written as one: math + 0.1 * format - 0.5 * overlong."""

    pattern: NonEmpty | None = None
    """For `regex`: a regular expression; its last match, or that one's first group, is the answer."""

    format: NonEmpty | None = None
    """For `format`: a regular expression that all of a response has to match; (?s) lets . match line ends."""

    url: NonEmpty | None = None
    """For `remote`: where items are posted, see megatron_flowrl/rewards/remote.py."""

    workers: PositiveInt = 2
    """Processes that grade."""

    timeout_seconds: PositiveFloat = 10.0
    """How long one answer may take; then its process is ended and replaced."""

    failed_score: float = 0.0
    """Reward of an answer that could not be graded."""

    binary: bool = False
    """Make rewards 1 from correct_from on, and 0 below."""

    correct_from: float = 1.0
    """Reward from which an answer counts as correct in the metrics."""

    code: CodeConfig = CodeConfig()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Held-out prompts, answered and graded within the run. They are read as the prompts that are trained on are."""

    path: NonEmpty | None = None
    """Where they are; see prompts.path. null: no evaluation."""

    split: NonEmpty = "test"
    """Split of a data set of the hub."""

    limit: PositiveInt | None = None
    """Rows to read, from the first. null: all."""

    interval: PositiveInt = 10
    """Steps from one evaluation to the next; there is one before the first step and one after the last."""

    n: PositiveInt = 4
    """Answers to each prompt."""

    temperature: PositiveFloat = 0.6
    """Sampling temperature."""

    top_p: Fraction = 0.95
    """Sampling from the most likely tokens that together have this probability."""

    max_tokens: PositiveInt | None = None
    """Longest answer, in tokens. null: generation.max_tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SftConfig:
    """Supervised training on given responses: the warm start of `megatron-flowrl sft`."""

    path: str = ""
    """Rows with prompt and response; see prompts.path. Must be given."""

    split: NonEmpty = "train"
    """Split of a data set of the hub."""

    response_column: NonEmpty = "response"
    """Column of the response: text, or token ids. EOS is put at its end."""

    sequences_per_step: PositiveInt = 256
    """Rows of one update."""

    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the rows that is kept from training and measured, every evaluation.interval steps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """What is printed."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity printed."""

    progress: bool = True
    """Progress bars, on a terminal only."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingConfig:
    """What is recorded in the run's folder, beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files."""

    histogram_interval: PositiveInt = 5
    """Steps between two histograms of rewards, residuals, weights, log Z and lengths."""

    samples: NonNegativeInt = 4
    """Answers of a step that are recorded as text."""

    peak_tflops: PositiveFloat | None = None
    """What a device can do at best, for the share that is used (MFU). null: by the GPU's name; measured on a CPU."""

    profile_steps: Annotated[tuple[PositiveInt, ...], Strict(False)] = ()
    """Steps of which torch's profiler writes a trace."""

    profile_ranks: Annotated[tuple[NonNegativeInt, ...], Strict(False)] = (0,)
    """Ranks that write one."""


__all__ = [
    "EvaluationConfig",
    "LoggingConfig",
    "PromptsConfig",
    "RewardConfig",
    "RunConfig",
    "SftConfig",
    "TrackingConfig",
]
