"""The config of a run: its keys (`schema`), reading it (`load`) and what cannot run (`checks`)."""

# ruff: noqa: F401 - these are the names that other packages import from here
from megatron_depthattn.config.checks import Sizes, validate
from megatron_depthattn.config.describe import config_reference
from megatron_depthattn.config.load import config_digest, config_keys, from_dict, load_config, save_config, to_dict
from megatron_depthattn.config.schema import (
    AttnResConfig,
    CheckpointConfig,
    DataConfig,
    DepthConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    StreamConfig,
    TrainConfig,
    WandbConfig,
)
