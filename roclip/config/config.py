"""Every setting of a run, as frozen dataclasses with their units, and the strict loader that fills them.

A run is one YAML preset plus dotted overrides (`pool.size=4096 train.lr=1e-3`). Unknown keys and wrong types
are errors that name the file, the key and the nearest known key. Loading a config runs no code.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from roclip.config import strict
from roclip.config.deploy_sections import DeployConfig
from roclip.config.ingest_sections import FetchPolicy as FetchPolicy
from roclip.config.ingest_sections import IngestConfig
from roclip.config.run_sections import AttacksConfig, ClusterConfig, DataConfig, EvaluateConfig, OracleConfig
from roclip.config.secrets import refuse_secrets
from roclip.config.train_sections import AugmentConfig, ModelConfig, PoolConfig, TrainConfig
from roclip.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the paper's setting (RN50, batch 512, K=2) on no particular data."""

    data: DataConfig
    name: str = "run"
    seed: int = 0
    runs: str = "runs"
    """Folder of the run directories."""
    run_dir: str = ""
    """This run's directory; empty is `<runs>/<date>-<name>`, the same again for the same config."""
    arms: tuple[Literal["clip", "roclip"], ...] = ("roclip",)
    """Trainings on the same data: `clip` is undefended, `roclip` uses the pool."""
    attacks: AttacksConfig = field(default_factory=AttacksConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    oracle: OracleConfig = field(default_factory=OracleConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)
    source: str = ""
    """The preset that this was loaded from; model files are looked up beside it."""

    def __post_init__(self) -> None:
        refuse_secrets(self)
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"arms: expected one or more different arms, got {list(self.arms)}.")
        if (self.train.push_away_weight or self.train.hold_weight) and not self.model.pretrained:
            raise ConfigError(
                "train.push_away_weight, hold_weight: expected weights to compare with. Set model.pretrained."
            )
        if not self.name or any(not (c.isalnum() or c in "-_.") for c in self.name):
            raise ConfigError(f"name: expected letters, digits, '-', '_' and '.', got {self.name!r}.")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML preset, apply `key=value` overrides and return the checked `Config`.

    Raises `ConfigError` naming the file (or the override), the key and the nearest known key.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise ConfigError(f"{path}: no such config. Presets here: {', '.join(near) or 'none'}.")
    config = strict.load(Config, str(path), path.read_text(), overrides)
    return config if config.source else dataclasses.replace(config, source=str(path.resolve()))


def parse_config(text: str) -> Config:
    """The `Config` that `dump_config` wrote. Raises `ConfigError`, such as for the config of another version."""
    return strict.load(Config, "config.yaml", text)


def dump_config(config: Config) -> str:
    """The resolved config as YAML, such that `parse_config` gives an equal one."""
    return strict.dump(config)


def run_directory(config: Config, *, today: datetime.date | None = None) -> Path:
    """Where this config runs: `run_dir` if set, else the newest run of the same config, else a new dated name."""
    if config.run_dir:
        return Path(config.run_dir)
    runs = Path(config.runs)
    for candidate in sorted(runs.glob(f"*-{config.name}*"), reverse=True):
        with contextlib.suppress(ConfigError, OSError):  # another version's run is another run
            if identity(parse_config((candidate / "config.yaml").read_text())) == identity(config):
                return candidate
    stem = f"{today or datetime.date.today()}-{config.name}"
    number, path = 1, runs / stem
    while (path / "config.yaml").exists():
        number += 1
        path = runs / f"{stem}.{number}"
    return path


def identity(config: Config) -> str:
    """The config without what changes neither data nor weights nor verdict: two runs of equal identity are one."""
    plain = TrainConfig()
    train = dataclasses.replace(
        config.train, checkpoint_store="", loggers=(), collective_timeout_s=plain.collective_timeout_s
    )
    measured = dataclasses.replace(config.evaluate, class_file="", template_file="", webdataset="")
    same = {
        "run_dir": "",
        "runs": "",
        "source": "",
        "deploy": DeployConfig(),
        "train": train,
        "oracle": config.oracle.of_verdict,
        "evaluate": measured,
        "cluster": ClusterConfig(),
    }
    return dump_config(dataclasses.replace(config, **same))


def model_file(config: Config) -> Path | None:
    """The JSON of the model, if it is one of the preset's own; None for a name that open_clip knows. The run's copy, where
    it has one, because the preset may not be on every node."""
    folders = [Path(where) for where in (config.run_dir, Path(config.source).parent) if where]
    paths = [folder / "models" / f"{config.model.name}.json" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def environment_defaults() -> None:
    """Settings that the libraries read from the environment, the same in every process of a run."""
    here = str(Path(sys.executable).parent)  # ninja lies there even if the environment was not activated
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("WDS_SECURE", "1")  # webdataset: no `pipe:`, no eval, no pickle
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # img2dataset's import would ask a registry for news
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no weights are fetched behind the user's back
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # 30 are too few on a busy machine
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
