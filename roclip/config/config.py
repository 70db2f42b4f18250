"""The config of a run and the loader that fills it from a YAML preset and dotted overrides.

Unknown and old keys and wrong types are errors that name the file, the key and the nearest or the new key. Loading runs no
code from the file.
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
from roclip.config.attacks import AttacksConfig
from roclip.config.cluster import ClusterConfig
from roclip.config.data import AugmentConfig, DataConfig
from roclip.config.ingest import IngestConfig
from roclip.config.model import ModelConfig
from roclip.config.oracle import EvaluateConfig, OracleConfig, RepairConfig
from roclip.config.pool import PoolConfig
from roclip.config.secrets import refuse_secrets
from roclip.config.train import TrainConfig
from roclip.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """One run.

    The defaults are this project's defence (neighbours, sample filter, suspicion model) at the size of the RoCLIP paper:
    RN50, a batch of 512, 24 epochs and a pool of 2 % of a million pairs. The paper's own method is `configs/cc3m.yaml`. No
    data is set.
    """

    data: DataConfig
    name: str = "run"
    """Name of the run: letters, digits, '-', '_' and '.'."""
    seed: int = 0
    """Seed of everything random: weights, order of samples, augmentation, rendered scenes, poisons."""
    runs: str = "runs"
    """Folder of the run directories."""
    run_dir: str = ""
    """This run's directory; empty is `<runs>/<date>-<name>`, and the same one again for the same config."""
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
    repair: RepairConfig = field(default_factory=RepairConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    source: str = ""
    """File that this config was loaded from, beside which `models/` is looked for. Set by the loader."""

    def __post_init__(self) -> None:
        refuse_secrets(self)
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"arms: expected one or more different arms, got {list(self.arms)}.")
        compares = self.repair.push_away_weight or self.repair.distillation_weight
        if self.train.objective == "repair" and compares and not self.model.pretrained:
            raise ConfigError(
                "train.objective: repair expected weights to compare with, got none. Set model.pretrained, or set "
                "repair.distillation_weight and repair.push_away_weight to 0."
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
    """Read the `Config` that `dump_config` wrote. Raises `ConfigError`, also for the config of another version."""
    return strict.load(Config, "config.yaml", text)


def dump_config(config: Config) -> str:
    """Write the resolved config as YAML from which `parse_config` reads an equal one."""
    return strict.dump(config)


def run_directory(config: Config, *, today: datetime.date | None = None) -> Path:
    """Where this config runs: `run_dir` if set, otherwise the newest run of the same config or a new dated name."""
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
    """The config without what affects neither data, weights nor verdict: two configs of equal identity are one run."""
    plain = TrainConfig()
    train = dataclasses.replace(
        config.train, checkpoint_store="", loggers=(), collective_timeout_s=plain.collective_timeout_s
    )
    measured = dataclasses.replace(config.evaluate, class_file="", template_file="", webdataset="")
    same = {
        "run_dir": "",
        "runs": "",
        "source": "",
        "train": train,
        "oracle": config.oracle.of_verdict,
        "repair": config.repair if config.train.objective == "repair" else config.repair.of_check,
        "evaluate": measured,
        "cluster": ClusterConfig(),
    }
    return dump_config(dataclasses.replace(config, **same))


def model_file(config: Config) -> Path | None:
    """The JSON file of a model that comes with the preset; None for a name that open_clip knows.

    The run's copy comes first, as the preset may not be on every node.
    """
    folders = [Path(where) for where in (config.run_dir, Path(config.source).parent) if where]
    paths = [folder / "models" / f"{config.model.name}.json" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def environment_defaults() -> None:
    """Set what libraries read from the environment, alike in every process of a run."""
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
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # an idle worker a core costs seconds of work
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
