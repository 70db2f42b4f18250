"""Every setting of a run as a frozen dataclass with its unit, and the strict loader that fills them.

In: a YAML preset and dotted overrides. Out: a checked `Config`. Loading one runs no code and imports no torch.
"""

from roclip.config.attacks import AttacksConfig, BackdoorConfig, TargetedConfig
from roclip.config.cluster import ClusterConfig
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
from roclip.config.data import AugmentConfig, DataConfig, DirtConfig, Strengths
from roclip.config.deploy import CloudConfig, DeployConfig, KubernetesConfig, OnPremiseConfig, SlurmConfig, load_deploy
from roclip.config.ingest import FetchPolicy, IngestConfig
from roclip.config.model import ModelConfig
from roclip.config.oracle import EvaluateConfig, OracleConfig, RepairConfig
from roclip.config.pool import PoolConfig
from roclip.config.train import TrainConfig

__all__ = [
    "AttacksConfig",
    "AugmentConfig",
    "BackdoorConfig",
    "CloudConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DeployConfig",
    "DirtConfig",
    "EvaluateConfig",
    "FetchPolicy",
    "IngestConfig",
    "KubernetesConfig",
    "ModelConfig",
    "OnPremiseConfig",
    "OracleConfig",
    "PoolConfig",
    "RepairConfig",
    "SlurmConfig",
    "Strengths",
    "TargetedConfig",
    "TrainConfig",
    "dump_config",
    "environment_defaults",
    "identity",
    "load_config",
    "load_deploy",
    "model_file",
    "parse_config",
    "run_directory",
]
