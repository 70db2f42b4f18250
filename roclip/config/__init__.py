"""Every setting of a run as a frozen dataclass with its unit, and the strict loader that fills them.

In: a YAML preset and dotted overrides. Out: a checked `Config`. Loading one runs no code and imports no torch.
"""

from roclip.config.config import (
    Config,
    dump_config,
    environment_defaults,
    identity,
    load_config,
    model_file,
    parse_config,
    run_directory,
)
from roclip.config.deploy_sections import CloudConfig, DeployConfig, KubernetesConfig, OnPremiseConfig, SlurmConfig
from roclip.config.ingest_sections import FetchPolicy, IngestConfig
from roclip.config.run_sections import (
    AttacksConfig,
    BackdoorConfig,
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    OracleConfig,
    TargetedConfig,
)
from roclip.config.train_sections import AugmentConfig, ModelConfig, PoolConfig, Strengths, TrainConfig

__all__ = [
    "AttacksConfig",
    "AugmentConfig",
    "BackdoorConfig",
    "CloudConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DeployConfig",
    "EvaluateConfig",
    "FetchPolicy",
    "IngestConfig",
    "KubernetesConfig",
    "ModelConfig",
    "OnPremiseConfig",
    "OracleConfig",
    "PoolConfig",
    "SlurmConfig",
    "Strengths",
    "TargetedConfig",
    "TrainConfig",
    "dump_config",
    "environment_defaults",
    "identity",
    "load_config",
    "model_file",
    "parse_config",
    "run_directory",
]
