"""The configuration: a typed schema, filled from a YAML recipe and dotted overrides.

Imports neither torch nor Megatron.
"""

from .checks import check_answers, check_config, data_parallel_size
from .cluster import Sizes, sizes_of
from .errors import SharedUserError, UserError, collected
from .help import format_help
from .load import given_keys, load_config, to_dict, to_yaml
from .objectives import (
    CriticConfig,
    FlowRLConfig,
    LogZConfig,
    ObjectiveConfig,
    PolicyGradientConfig,
    SamplerCorrectionConfig,
)
from .presets import METHODS, PRESETS
from .run import (
    CodeConfig,
    EvaluationConfig,
    LoggingConfig,
    PromptsConfig,
    RewardConfig,
    RunConfig,
    SftConfig,
    TrackingConfig,
)
from .schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedDataParallelConfig,
    GenerationConfig,
    LogProbConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    ReferenceConfig,
    RolloutConfig,
)

__all__ = [
    "METHODS",
    "PRESETS",
    "CheckpointConfig",
    "CodeConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DistributedDataParallelConfig",
    "EvaluationConfig",
    "FlowRLConfig",
    "GenerationConfig",
    "LogProbConfig",
    "LogZConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolicyGradientConfig",
    "PrecisionConfig",
    "PromptsConfig",
    "RecomputeConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplerCorrectionConfig",
    "SftConfig",
    "SharedUserError",
    "Sizes",
    "TrackingConfig",
    "UserError",
    "check_answers",
    "check_config",
    "collected",
    "data_parallel_size",
    "format_help",
    "given_keys",
    "load_config",
    "sizes_of",
    "to_dict",
    "to_yaml",
]
