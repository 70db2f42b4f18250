"""The sections of a config around the training: data, attacks, evaluation, oracle, cluster."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from roclip.config.strict import fraction, positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from: one of `urls`, `images` and `scenes`, or `shards` alone, ingested before."""

    urls: str = ""
    """URL lists to ingest: parquet, csv, tsv, jsonl, json or txt, also as .gz and .zst; a file, a folder or a glob on any
    store that fsspec knows; several with `::` between them."""
    images: str = ""
    """Parquet of encoded images that the embedded origin serves as a URL list (columns below)."""
    scenes: int = 0
    """Number of scenes to render and serve from the embedded origin."""
    limit: int = 0
    """Use at most this many rows of `urls` or `images`; 0 is all."""
    url_col: str = ""
    """Of `urls`; empty takes the first that is there of url, URL, image_url."""
    caption_col: str = "caption"
    """Of `urls`: the first that is there of this, caption, TEXT, text. Empty, for `images`: varied captions of the class are
    written instead (`roclip/attacks/class_captions.py`)."""
    image_col: str = "image"
    label_col: str = "label"
    """Class name of an image, where `images` has one: for attacks and evaluation, never for training."""
    faults: bool = True
    """The embedded origin also serves dead links, redirects, broken images and slow answers."""
    shards: str = ""
    """Folder of the shards and their manifest, which ingest fills and training reads, here or on a store that fsspec knows
    (`s3://bucket/shards`); empty is `<run>/shards`. Or ready-made tars: a folder of them, or patterns with braces and globs
    (`cc3m/{00000..00331}.tar`), with `::` between several sources."""
    caption_key: str = ""
    """Key of the json member that holds the caption, or a list of captions of which one is chosen by (seed, epoch, sample);
    empty reads the txt member."""
    cache_dir: str = ""
    """Where copies of a store's shards lie; empty is `roclip-shards-<user id>` in the folder for temporary files."""
    cache_bytes: int = 50_000_000_000
    """What these copies may take on each node; the one used longest ago goes first. 0 keeps none: samples are read by range."""
    min_shards: int = 1
    """Training starts when the manifest names this many shards, or when ingest has ended."""
    wait_s: float = 600.0
    """How long training waits for `min_shards` before it gives up."""
    max_bad_frac: float = 0.1
    """Share of unreadable samples (of those fetched) above which a shard or an epoch is an error."""
    upsampling: tuple[float, ...] = ()
    """How often an epoch reads each source of `shards`, in their order, such as 1.5; empty is once each."""
    resampled: bool = False
    """Draw the shards of an epoch with replacement, as webdataset's users are used to, instead of each in its turn."""
    last_batch: Literal["drop", "pad"] = "drop"
    """Samples at an epoch's end that do not fill a global batch: left to another epoch, or a step of their own, whose
    other rows are left out of the loss."""
    streams: int = 16
    """Virtual streams V of the sample order; the order does not depend on the number of ranks."""
    shuffle_buffer: int = 1024
    """Samples in each stream's seeded shuffle buffer."""
    loader_workers: int = 0
    """Processes a rank that read ahead; 0 reads in the training process."""

    @property
    def fetches(self) -> bool:
        """Whether there is anything to fetch; without it, training takes the shards that are there."""
        return bool(self.urls or self.images or self.scenes)

    def __post_init__(self) -> None:
        positive(self, "data", "min_shards", "streams", "shuffle_buffer", "wait_s")
        sources = len(self.shards.split("::"))
        weights = self.upsampling
        if weights and (sources < 2 or len(weights) != sources or min(weights) < 0 or not any(weights)):
            raise ConfigError(
                "data.upsampling: expected a number from 0 on, not all 0, for each of several sources of data.shards "
                f"(`::`), got {list(weights)} for {sources}."
            )
        if sum(map(bool, (self.urls, self.images, self.scenes, self.shards))) == 0:
            raise ConfigError(
                "data: expected one source, got none. Set data.urls (a URL list), data.images (a parquet of images), "
                "data.scenes (a number) or data.shards (a folder that was ingested before)."
            )
        fetched = (self.urls, self.images, self.scenes)
        if any(fetched) and any(mark in self.shards for mark in ("::", "{", "*", "?")):
            raise ConfigError(
                f"data.shards: expected one folder to ingest into, got the pattern {self.shards!r}. Train on ready-made tars "
                "without data.urls, data.images and data.scenes."
            )
        if sum(map(bool, fetched)) > 1:
            raise ConfigError("data: expected one of data.urls, data.images and data.scenes, got several. Keep one.")


@dataclass(frozen=True)
class TargetedConfig:
    """Targeted poisoning: an image, not in the clean data, that appears with several captions of another class."""

    images: int = 0
    captions_per_image: int = 8


@dataclass(frozen=True)
class BackdoorConfig:
    """A trigger on images that are captioned as one target class. Off while `count` and `rate` are 0."""

    count: int = 0
    """Poisoned pairs."""
    rate: float = 0.0
    """Poisoned pairs as a share of the clean rows, instead of `count`."""
    target_label: str = ""
    """Class that the trigger should cause; empty takes the first in alphabetical order that no other backdoor has."""
    trigger: Literal["patch", "noise_patch", "blend", "warp", "sinusoid"] = "patch"
    size_frac: float = 0.1
    """Side of a patch as a share of the shorter image side."""
    place: Literal["random", "corner"] = "random"
    """Of a patch."""
    strength: float = 0.2
    """Opacity of a blend; mean shift of a warp as a share of the shorter side; amplitude of a sinusoid over 255."""
    clean_label: bool = False
    """Images of the target class itself, with their own captions: no caption lies."""
    perturb_frac: float = 0.0
    """Share of uniform noise mixed into the picture under the trigger, so that the trigger is easier to learn than
    what the picture shows."""


@dataclass(frozen=True)
class AttacksConfig:
    """What an attacker adds to the embedded origin's URL list, or `roclip poison` to shards or a list. For evaluation
    only; never touches `data.urls`. Attacks may run together: their images are disjoint."""

    targeted: TargetedConfig = field(default_factory=TargetedConfig)
    backdoor: BackdoorConfig = field(default_factory=BackdoorConfig)
    """BadNets."""
    blended: BackdoorConfig = field(default_factory=lambda: BackdoorConfig(trigger="blend"))
    wanet: BackdoorConfig = field(default_factory=lambda: BackdoorConfig(trigger="warp", strength=0.03))
    sig: BackdoorConfig = field(default_factory=lambda: BackdoorConfig(trigger="sinusoid"))
    label_consistent: BackdoorConfig = field(
        default_factory=lambda: BackdoorConfig(place="corner", clean_label=True, perturb_frac=0.4)
    )
    captions: Literal["target", "both"] = "target"
    """`both`: a poison's caption also tells the truth about its image, as an attacker would who knows the gate."""
    flood: int = 0
    """Further pairs of the attacks' target captions with images of other classes and no trigger: they fill the pool."""
    late: bool = False
    """Poisons come in the last rows of the list, so in the last shards, instead of anywhere."""

    def __post_init__(self) -> None:
        for name, value in {
            "targeted.images": self.targeted.images,
            "targeted.captions_per_image": self.targeted.captions_per_image,
            "flood": self.flood,
            **{f"{name}.count": backdoor.count for name, backdoor in self._all().items()},
        }.items():
            if value < 0:
                raise ConfigError(f"attacks.{name}: expected 0 or more, got {value}.")
        for name, backdoor in self._all().items():
            where = f"attacks.{name}"
            fraction(backdoor, where, "rate", "size_frac", "strength", "perturb_frac")
            positive(backdoor, where, "size_frac", "strength")
            if backdoor.count and backdoor.rate:
                raise ConfigError(f"{where}: expected count or rate, got both. Keep one.")
        if self.flood and not self.targeted.images and not self.backdoors:
            raise ConfigError("attacks.flood: expected an attack whose captions flood the pool, got none. Set a count.")

    @property
    def backdoors(self) -> dict[str, BackdoorConfig]:
        """Those that are on, by name."""
        return {name: backdoor for name, backdoor in self._all().items() if backdoor.count or backdoor.rate}

    def count(self, name: str, rows: int) -> int:
        """Poisoned pairs of a backdoor that is on, beside so many clean rows."""
        backdoor = self._all()[name]
        return backdoor.count or max(1, round(backdoor.rate * rows))

    def pairs(self, rows: int) -> int:
        """Poisoned pairs of all attacks beside so many clean rows."""
        backdoors = sum(self.count(name, rows) for name in self.backdoors)
        return self.targeted.images * self.targeted.captions_per_image + backdoors + self.flood

    def _all(self) -> dict[str, BackdoorConfig]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, BackdoorConfig)}


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
    """Prompts of the zero-shot classifier; `{}` or `{c}` stands for the class name."""
    class_file: str = ""
    """JSON with the zero-shot classes: a list of names, or {label: [names]}; empty takes those of the held-out images."""
    template_file: str = ""
    """JSON list of templates, instead of `templates` or those of the held-out images."""
    webdataset: str = ""
    """Held-out images in WebDataset tars, as CLIP_benchmark lays them out: a folder, or a pattern of tars."""
    every: int = 1
    """Epochs between the evaluations of a phase on the way, matched and plain for themselves; 0 is only the end."""

    def __post_init__(self) -> None:
        positive(self, "evaluate", "size")
        if self.every < 0 or self.classes < 0:
            raise ConfigError("evaluate.every, evaluate.classes: expected 0 or more.")
        if bad := [template for template in self.templates if "{}" not in template and "{c}" not in template]:
            raise ConfigError(f"evaluate.templates: expected {{}} where the class name goes, got {bad[0]!r}.")


@dataclass(frozen=True)
class OracleConfig:
    """The check of a finished checkpoint by a segmentation network that never saw the crawled data."""

    weights: str = ""
    """The oracle: a folder that `roclip train-segmenter` wrote; `torchvision:NAME:FILE` (such as deeplabv3_resnet50 or
    maskrcnn_resnet50_fpn); `hf:FOLDER` (transformers); `masks:PATH` (drawn by people). All local: nothing is downloaded.
    Empty trains one on the trusted images."""
    labels: tuple[str, ...] = ()
    """What is asked about, for data that ingest did not prepare (the run has no origin/labels.json)."""
    label_file: str = ""
    """The same in a file: a JSON list, or a text with one a line."""
    label_map: dict[str, str] = field(default_factory=dict)
    """Further names of labels, in captions and among the oracle's classes: `{couch: sofa, television: tv}`."""
    trusted_file: str = ""
    """Parquet of trusted images with masks (image, mask of indices into the labels, 0 background); empty is the run's
    origin/trusted.parquet. Without either nothing says how often model and oracle disagree where nothing is poisoned."""
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
    """Verdict from which on the command ends with 10 (suspicious), 20 (poisoned), 21 (poisoned, repaired and trusted) or, with
    `suspicious`, 30 (inconclusive)."""
    actors: int = 1
    """Ray actors that look at the shards. Each takes what CPUs there are for it: one takes a whole node, so take as many
    as there are nodes, or GPUs. What they see does not depend on their number."""
    gpus_per_actor: float = 0.0
    """Such as 0.5, for two on one GPU."""

    repair: bool = False
    """Fine-tune a checkpoint that is called poisoned or suspicious on a small set that the check has chosen, check it
    again, and trust it if nothing is left."""
    repair_frac: float = 0.02
    """Size of that set, at most, as a share of the distinct images."""
    repair_stamped_frac: float = 0.2
    """Share of the set that shows a found trigger under the picture's own, true caption."""
    repair_epochs: int = 12
    """Passes over the set; of twelve moments of the training the last is taken at which no trigger works."""
    repair_steps: int = 1600
    """Optimizer steps, at least: a small set is passed over more often."""
    repair_lr: float = 5e-4
    repair_batch_size: int = 128
    """Pairs a step, at most: a small set is divided into at least four steps."""
    repair_hold_weight: float = 24.0
    """`train.hold_weight` of the repair: the tower is held where it was, found triggers lose their effect, and lies are
    refuted (these always with weight 1); 0 does none of it."""
    repair_in_modal_weight: float = 0.0
    """`train.in_modal_weight` of the repair."""
    repair_push_away_weight: float = 0.0
    """`train.push_away_weight` of the repair."""

    def __post_init__(self) -> None:
        if self.labels and self.label_file:
            raise ConfigError("oracle: expected labels or label_file, got both. Keep one.")
        positive(self, "oracle", "trusted", "epochs", "alpha", "actors")
        if self.gpus_per_actor < 0:
            raise ConfigError(f"oracle.gpus_per_actor: expected 0 or more, got {self.gpus_per_actor}.")
        positive(self, "oracle", "repair_frac", "repair_epochs", "repair_steps", "repair_lr", "repair_batch_size")
        fraction(self, "oracle", "reference_frac", "repair_frac", "repair_stamped_frac")

    @property
    def of_verdict(self) -> "OracleConfig":
        """The same settings without those that the check, its verdict and its set for a repair, does not depend on."""
        plain = OracleConfig()
        chosen_by_check = ("repair_frac", "repair_stamped_frac")
        repair = {
            item.name: getattr(plain, item.name)
            for item in fields(self)
            if item.name.startswith("repair") and item.name not in chosen_by_check
        }
        return replace(self, fail_on="never", actors=1, gpus_per_actor=0.0, **repair)


@dataclass(frozen=True)
class ClusterConfig:
    """Ray."""

    address: str = "local"
    """`local` starts a Ray of its own on loopback; else the address of a running cluster."""
    workers: int = 1
    """Training ranks."""
    min_workers: int = 0
    """Fewest ranks that training goes on with when nodes are lost; 0 is `workers`, no fewer."""
    resize_every_s: float = 60.0
    """How often a training with fewer ranks than `workers` looks whether a node has come that has room for more."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    cpus_per_ingest_task: float = 1.0
    ingest_resource: str = ""
    """Custom Ray resource, such as `ingest`, of the nodes that fetch: one unit a task, so that downloads stay off GPU nodes."""
    dashboard: bool = False
    """Start Ray's dashboard on loopback, for `address: local`."""
    max_failures: int = 1
    """Restarts of a training whose worker died."""
    queue_timeout_s: float = 0.0
    """How long a stage waits for room on the cluster before the command ends; 0 waits as long as it takes. What could never
    have room is waited for five minutes at most, as nodes may join, and not at all with `address: local`."""
    store_memory_bytes: int = 256 * 2**20
    """Ray's object store on the local Ray; shards never pass through it."""

    def __post_init__(self) -> None:
        positive(self, "cluster", "workers", "cpus_per_worker", "cpus_per_ingest_task", "resize_every_s")
        if self.queue_timeout_s < 0:
            raise ConfigError(f"cluster.queue_timeout_s: expected 0 or more, got {self.queue_timeout_s}.")
        if self.address.startswith("ray://"):
            raise ConfigError(
                f"cluster.address: expected local, auto or IP:PORT on a node of the cluster, got {self.address!r}: Ray's "
                "client cannot drive a training. From outside use `roclip submit CONFIG --address http://HEAD:8265`."
            )
        if not 0 <= self.min_workers <= self.workers:
            raise ConfigError(
                f"cluster.min_workers: expected 0 to cluster.workers = {self.workers}, got {self.min_workers}. Set 0."
            )

    @property
    def elastic(self) -> bool:
        """Whether a training may go on with fewer ranks than `workers`."""
        return 0 < self.min_workers < self.workers
