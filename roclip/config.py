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
from typing import Any, Literal

from roclip import strict
from roclip.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from. Exactly one of `urls`, `images`, `scenes` is set."""

    urls: str = ""
    """URL list to ingest: parquet, csv, tsv, jsonl or txt, any fsspec path, or a folder or glob of such files."""
    images: str = ""
    """Parquet of encoded images that the embedded origin serves as a URL list (columns below)."""
    scenes: int = 0
    """Number of scenes to render and serve from the embedded origin."""
    limit: int = 0
    """Use at most this many rows of `urls` or `images`; 0 is all."""
    url_col: str = "url"
    caption_col: str = "caption"
    image_col: str = "image"
    label_col: str = "label"
    """Class name of an image, where `images` has one: for attacks and evaluation, never for training."""
    faults: bool = True
    """The embedded origin also serves dead links, redirects, broken images and slow answers."""
    shards: str = ""
    """Folder of the shards and their manifest; empty is `<run>/shards`."""
    min_shards: int = 1
    """Training starts when the manifest names this many shards, or when ingest has ended."""
    wait_s: float = 600.0
    """How long training waits for `min_shards` before it gives up."""
    max_bad_frac: float = 0.1
    """Share of unreadable samples (of those fetched) above which a shard or an epoch is an error."""
    streams: int = 16
    """Virtual streams V of the sample order; the order does not depend on the number of ranks."""
    shuffle_buffer: int = 1024
    """Samples in each stream's seeded shuffle buffer."""
    loader_workers: int = 0
    """Processes a rank that read ahead; 0 reads in the training process."""

    def __post_init__(self) -> None:
        _positive(self, "data", "min_shards", "streams", "shuffle_buffer", "wait_s")
        _fraction(self, "data", "max_bad_frac")
        if sum(map(bool, (self.urls, self.images, self.scenes, self.shards))) == 0:
            raise ConfigError(
                "data: expected one source, got none. Set data.urls (a URL list), data.images (a parquet of images), "
                "data.scenes (a number) or data.shards (a folder that was ingested before)."
            )
        if sum(map(bool, (self.urls, self.images, self.scenes))) > 1:
            raise ConfigError("data: expected one of data.urls, data.images and data.scenes, got several. Keep one.")


@dataclass(frozen=True)
class TargetedConfig:
    """Targeted poisoning: an image, not in the clean data, that appears with several captions of another class."""

    images: int = 0
    captions_per_image: int = 8


@dataclass(frozen=True)
class BackdoorConfig:
    """Backdoor: a small patch on images that are captioned with one target class."""

    count: int = 0
    """Poisoned pairs added to the data."""
    target_label: str = ""
    """Class that the trigger should cause; empty takes the first label in alphabetical order."""
    size_frac: float = 0.1
    """Side of the patch as a share of the shorter image side."""
    place: Literal["random", "corner"] = "random"

    def __post_init__(self) -> None:
        _fraction(self, "attacks.backdoor", "size_frac")


@dataclass(frozen=True)
class AttacksConfig:
    """What an attacker adds to the embedded origin's URL list. For evaluation only; never touches `data.urls`."""

    targeted: TargetedConfig = field(default_factory=TargetedConfig)
    backdoor: BackdoorConfig = field(default_factory=BackdoorConfig)


@dataclass(frozen=True)
class IngestConfig:
    """How URLs become shards. Names and meanings follow img2dataset."""

    samples_per_shard: int = 10_000
    image_size: int = 256
    """Side of the stored images, in pixels."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "border"
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = 95
    """JPEG and WebP quality; for PNG the compression level 0 to 9."""
    threads: int = 32
    """Concurrent downloads in one task."""
    timeout_s: float = 10.0
    """Longest wait for one answer of a server."""
    retries: int = 1
    """Further tries of one URL."""
    max_in_flight: int = 2
    """Shards that are fetched at the same time."""
    shard_retries: int = 2
    """Further tries of one shard whose task failed."""
    allow_private: bool = False
    """Also fetch from loopback and private addresses. The embedded origin turns it on for its own list."""

    def __post_init__(self) -> None:
        _positive(self, "ingest", "samples_per_shard", "image_size", "threads", "timeout_s", "max_in_flight")
        if self.encode_format == "png" and not 0 <= self.encode_quality <= 9:
            raise ConfigError(
                f"ingest.encode_quality: expected 0 to 9 for png (compression), got {self.encode_quality}. Set 6."
            )


@dataclass(frozen=True)
class ModelConfig:
    """The two towers."""

    name: str = "RN50"
    """An open_clip model, or a JSON file's stem in `models/` beside the preset."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class AugmentConfig:
    """Image augmentation, drawn afresh for each (seed, epoch, sample)."""

    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area of the random crop as a share of the image; (1, 1) is none."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.4
    """Largest relative change of brightness, contrast and saturation."""
    gray: float = 0.0
    """Probability of a grey image."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""

    def __post_init__(self) -> None:
        _fraction(self, "augment", "flip", "jitter", "gray", "blur")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"augment.crop_scale: expected 0 < low <= high <= 1, got {self.crop_scale}.")


@dataclass(frozen=True)
class PoolConfig:
    """The caption pool and what it is used for; see `roclip/pool.py`."""

    size: int = 21_845
    """Captions kept. The paper's setting is 2 % of the data."""
    match_every: int = 2
    """K: every K-th epoch, counted from 1, is matched; 0 is never."""
    warmup_epochs: int = 1
    """Epochs before the first one that may be matched."""
    update: Literal["always", "matched_only"] = "always"
    """When captions enter the pool; `matched_only` is what the official code does."""
    gate_frac: tuple[float, float] = (0.0, 0.0)
    """Share of least agreeing pairs of a global batch that a plain step leaves out, at the start and at the end (linear
    in epochs between); (0, 0) is the paper's method. It starts when the pool is full."""
    gate_memory: float = 0.8
    """Weight of a sample's earlier visits in its score: what was suspected once is not forgiven at once."""
    duplicates: Literal["keep", "mask"] = "keep"
    """Whether images that a matched step gave the same caption stay each other's negatives (`keep`, the paper)."""
    backend: Literal["faiss", "torch"] = "faiss"

    def __post_init__(self) -> None:
        _positive(self, "pool", "size")
        _fraction(self, "pool", "gate_memory")
        if not all(0 <= share <= 1 for share in self.gate_frac):
            raise ConfigError(f"pool.gate_frac: expected two shares from 0 to 1, got {self.gate_frac}.")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = 24
    global_batch_size: int = 512
    """Pairs a step, over all ranks."""
    lr: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_epochs: float = 1.0
    """Linear warm-up of the learning rate, then cosine to zero."""
    grad_clip_norm: float = 0.0
    """Largest global gradient norm; 0 is no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1] = 1
    """DeepSpeed ZeRO stage."""
    checkpoint_every_steps: int = 500
    """Optimizer steps between checkpoints; an epoch's end is always one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        _positive(self, "train", "epochs", "global_batch_size", "lr", "checkpoint_every_steps", "log_every_steps")
        _positive(self, "train", "keep_checkpoints")


@dataclass(frozen=True)
class EvaluateConfig:
    """What a checkpoint is measured with."""

    images: str = ""
    """Parquet of held-out images with caption and label; empty holds out rows of `data.images` or renders scenes."""
    size: int = 600
    """Held-out images used."""
    classes: int = 0
    """Zero-shot over this many most frequent labels; 0 is all."""
    templates: tuple[str, ...] = ("a photo of a {}", "a picture of a {}", "{}")
    every: int = 1
    """Epochs between the evaluations on the way, so that matched and plain phases are both seen; 0 is only the end."""


@dataclass(frozen=True)
class OracleConfig:
    """The check of a finished checkpoint by a segmentation network that never saw the crawled data."""

    weights: str = ""
    """Trained segmenter (a folder that `roclip.oracle.segmenters` wrote); empty trains one on the trusted images."""
    trusted: int = 2000
    """Trusted images with masks, rendered or set aside, never served: they train the segmenter and give the null."""
    reference_frac: float = 0.3
    """Share of the trusted images that the segmenter does not train on: how often do model and oracle disagree
    where nothing is poisoned."""
    epochs: int = 15
    """Passes of the segmenter's training."""
    alpha: float = 0.01
    """Family-wise error rate of the label test (Holm)."""
    fail_on: Literal["never", "suspicious", "poisoned"] = "never"
    """Verdict from which on the command ends with 10 (suspicious) or 20 (poisoned)."""

    def __post_init__(self) -> None:
        _positive(self, "oracle", "trusted", "epochs", "alpha")
        _fraction(self, "oracle", "reference_frac")


@dataclass(frozen=True)
class ClusterConfig:
    """Ray."""

    address: str = "local"
    """`local` starts a Ray of its own on loopback; else the address of a running cluster."""
    workers: int = 1
    """Training ranks."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    cpus_per_ingest_task: float = 1.0
    dashboard: bool = False
    """Start Ray's dashboard on loopback, for `address: local`."""
    max_failures: int = 1
    """Restarts of a training whose worker died."""
    store_memory_bytes: int = 256 * 2**20
    """Ray's object store on the local Ray; shards never pass through it."""

    def __post_init__(self) -> None:
        _positive(self, "cluster", "workers", "cpus_per_worker", "cpus_per_ingest_task")


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
    source: str = ""
    """The preset that this was loaded from; model files are looked up beside it."""

    def __post_init__(self) -> None:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"arms: expected one or more different arms, got {list(self.arms)}.")
        if not self.name or any(not (c.isalnum() or c in "-_.") for c in self.name):
            raise ConfigError(f"name: expected letters, digits, '-', '_' and '.', got {self.name!r}.")
        batch, workers = self.train.global_batch_size, self.cluster.workers
        if batch % workers:
            raise ConfigError(
                f"train.global_batch_size: expected a multiple of cluster.workers = {workers}, got {batch}. "
                f"Set {batch // workers * workers or workers}."
            )


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
    oracle = dataclasses.replace(config.oracle, fail_on="never")
    return dump_config(dataclasses.replace(config, run_dir="", runs="", source="", oracle=oracle))


def model_file(config: Config) -> Path | None:
    """The JSON of the model, if it is one of the preset's own; None for a name that open_clip knows."""
    path = Path(config.source).parent / "models" / f"{config.model.name}.json"
    return path if path.is_file() else None


def _positive(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) <= 0:
            raise ConfigError(f"{name}.{key}: expected more than 0, got {getattr(section, key)}.")


def _fraction(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(section, key) <= 1:
            raise ConfigError(f"{name}.{key}: expected a share from 0 to 1, got {getattr(section, key)}.")


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
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
