"""The config of a run: its keys (`schema`), reading it (`load`) and what cannot run (`checks`)."""

from megatron_depthattn.config.checks import Sizes, validate
from megatron_depthattn.config.describe import config_reference
from megatron_depthattn.config.load import config_digest, config_keys, from_dict, load_config, save_config, to_dict
from megatron_depthattn.config.schema import (
    AttnResConfig,
    CheckpointConfig,
    DataConfig,
    DenseFormerConfig,
    DepthConfig,
    EngineConfig,
    MHCConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    PreflightConfig,
    RecomputeConfig,
    RunConfig,
    RunDirConfig,
    StreamConfig,
    TrainConfig,
)

__all__ = [
    "AttnResConfig",
    "CheckpointConfig",
    "DataConfig",
    "DenseFormerConfig",
    "DepthConfig",
    "EngineConfig",
    "MHCConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PreflightConfig",
    "RecomputeConfig",
    "RunConfig",
    "RunDirConfig",
    "Sizes",
    "StreamConfig",
    "TrainConfig",
    "config_digest",
    "config_keys",
    "config_reference",
    "from_dict",
    "load_config",
    "save_config",
    "to_dict",
    "validate",
]
