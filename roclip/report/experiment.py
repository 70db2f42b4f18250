"""An experiment for `roclip compare`: several arms on the same poisoned data, with several seeds.

An experiment's file is a preset with four more keys:

    seeds: [0, 1, 2]
    arms:                                     # the others are compared with the first
      clip: {method: clip}
      paper: {method: roclip, set: {pool: {match_every: 2}}}
    sweep:                                    # optional: what the attacker adds, one corpus each
      few: {attacks: {backdoors: [{kind: patch, count: 8}]}}
    points: [few]                             # points of the sweep to train

Everything else is shared by all arms. An arm may change how it learns, never what: data, order, model, augmentation,
batch, epochs and evaluation stay the same, or it would be another comparison.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from roclip.config import Config, strict
from roclip.errors import ConfigError

SHARED = ("seed", "data", "attacks", "ingest", "model", "augment", "evaluate", "cluster")
SHARED_TRAIN = ("epochs", "global_batch_size")
"""Settings that all arms of a corpus share."""
_TAKEN = ("origin", "shards", "snapshots", "segmenter", "ray")


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    method: Literal["clip", "roclip"] = "roclip"
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the shared ones, nested as in a preset."""


@dataclass(frozen=True)
class Protocol:
    """The keys of an experiment that a preset does not have."""

    arms: dict[str, Arm]
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed makes its own corpus, and seeds the weights, the order and the augmentation of all its arms."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Settings by the name of a point; an empty sweep is a single point named `data`."""
    points: tuple[str, ...] = ()
    """The points of the sweep to train; empty means the first."""

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(
                f"expected one arm or more and different seeds, got {list(self.arms)} and {list(self.seeds)}."
            )
        for key, names in (("arms", self.arms), ("sweep", self.sweep)):
            for name in names:
                if name in _TAKEN or not name or any(not (c.isalnum() or c in "-_") for c in name):
                    raise ConfigError(
                        f"{key}: expected a name of letters, digits, '-' and '_' that is none of "
                        f"{', '.join(_TAKEN)}, got {name!r}."
                    )
        if unknown := [point for point in self.points if point not in self.sweep]:
            raise ConfigError(f"points: expected some of {', '.join(self.sweep) or 'an empty sweep'}, got {unknown}.")


@dataclass(frozen=True)
class Training:
    """One arm on one corpus."""

    arm: str
    method: Literal["clip", "roclip"]
    config: Config


@dataclass(frozen=True)
class Corpus:
    """The data of one point and one seed, and the trainings on it."""

    point: str
    seed: int
    config: Config
    trainings: tuple[Training, ...]

    @property
    def name(self) -> str:
        """Name of its folder in the experiment's folder."""
        return f"{self.point}-seed{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A checked experiment."""

    shared: Config
    protocol: Protocol
    corpora: tuple[Corpus, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.protocol.arms)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment and dotted overrides, of its own keys (`seeds=[0]`, `arms.paper.set.pool.size=64`) and of the
    shared config (`data.limit=2000`), which points and arms may still change.

    Raises `ConfigError` naming the file, the key and the nearest known key, or the arm that is not comparable.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs/experiments").glob("*.yaml"))
        raise ConfigError(f"{path}: no such experiment. There are: {', '.join(known) or 'none'}.")
    try:
        content = OmegaConf.create(path.read_text())
    except Exception as error:
        raise ConfigError(f"{path}: expected YAML, got {str(error).splitlines()[0]}.") from error
    if not isinstance(content, DictConfig) or "arms" not in content:
        raise ConfigError(f"{path}: expected `arms`, a mapping of names to methods; a preset is for `roclip run`.")
    own = {item.name for item in dataclasses.fields(Protocol)}
    mine, shared_overrides = [], []
    for override in overrides:
        key = override.partition("=")[0].split(".")[0]
        if key == "seed":
            raise ConfigError(f"{override}: expected seeds=[…] in an experiment.")
        (mine if key in own else shared_overrides).append(override)
    protocol = strict.load(Protocol, str(path), _yaml(content, own), mine)
    shared = strict.load(Config, str(path), _yaml(content, set(map(str, content)) - own), shared_overrides)
    shared = dataclasses.replace(shared, source=shared.source or str(path.resolve()))
    points = protocol.points or tuple(protocol.sweep)[:1] or ("data",)
    corpora = [corpus for point in points for corpus in _corpora(path, shared, protocol, point)]
    return Experiment(shared, protocol, tuple(corpora))


def _corpora(path: Path, shared: Config, protocol: Protocol, point: str) -> list[Corpus]:
    """The corpora of one point, one for each seed."""
    common = _with(shared, protocol.sweep.get(point), f"{path}: sweep.{point}")
    arms = {}
    for name, arm in protocol.arms.items():
        arms[name] = dataclasses.replace(_with(common, arm.set, f"{path}: arms.{name}.set"), arms=(arm.method,))
        if changed := _changed(common, arms[name]):
            raise ConfigError(
                f"{path}: arms.{name}.set: expected only how this arm learns, got {', '.join(changed)}, which all "
                "arms share. Set it for the whole experiment."
            )
    corpora = []
    for seed in protocol.seeds:
        trainings = [
            Training(name, protocol.arms[name].method, dataclasses.replace(config, seed=seed))
            for name, config in arms.items()
        ]
        corpora.append(Corpus(point, seed, dataclasses.replace(common, seed=seed), tuple(trainings)))
    return corpora


def _changed(common: Config, own: Config) -> list[str]:
    sections = [name for name in SHARED if getattr(common, name) != getattr(own, name)]
    return sections + [f"train.{k}" for k in SHARED_TRAIN if getattr(common.train, k) != getattr(own.train, k)]


def _with(config: Config, settings: Any, where: str) -> Config:
    if not settings:
        return config
    try:
        merged = OmegaConf.merge(OmegaConf.create(strict.dump(config)), OmegaConf.create(settings))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: expected settings as in a preset, got {settings!r}.") from error
    return strict.load(Config, where, OmegaConf.to_yaml(merged))


def _yaml(content: DictConfig, keys: set[str]) -> str:
    return OmegaConf.to_yaml(OmegaConf.masked_copy(content, [key for key in content if key in keys]))
