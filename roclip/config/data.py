"""Where pairs come from, in which order they are read and how they are augmented."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from roclip.config.strict import fraction, positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class DirtConfig:
    """What is wrong with a crawl that nobody poisoned; for the embedded origin, whose data are clean."""

    mismatched_frac: float = 0.0
    """Share of the pairs that have the caption of another pair, from 0 to 1. On the web it is about 0.3."""
    copied_frac: float = 0.0
    """Share of the pairs whose image occurs twelve times, each time with a caption of its class, from 0 to 1."""

    def __post_init__(self) -> None:
        fraction(self, "data.dirt", "mismatched_frac", "copied_frac")


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from: one of `urls`, `images` and `scenes`, or `shards` alone if they were ingested before."""

    urls: str = ""
    """URL lists to ingest: parquet, csv, tsv, jsonl, json or txt, optionally .gz or .zst; a file, a folder or a glob on any
    store that fsspec knows, or several with `::` between them."""
    images: str = ""
    """Parquet file of encoded images that the embedded origin serves as a URL list."""
    scenes: int = 0
    """Number of scenes to render and serve from the embedded origin."""
    limit: int = 0
    """Largest number of rows of `urls` or `images` to use; 0 is all."""
    url_col: str = ""
    """Column of `urls` with the URL; empty takes the first that exists of url, URL, image_url."""
    caption_col: str = "caption"
    """Column with the caption; for `urls`, the first that exists of this, caption, TEXT, text. Empty, with `images`, writes
    varied captions of the class instead (`roclip/attacks/class_captions.py`)."""
    image_col: str = "image"
    """Column of `images` with the encoded image."""
    label_col: str = "label"
    """Column of `images` with the class name, if there is one: for attacks and evaluation, never for training."""
    faults: bool = True
    """Let the embedded origin also serve dead links, redirects, broken images and slow answers."""
    dirt: DirtConfig = field(default_factory=DirtConfig)
    shards: str = ""
    """Folder of the shards and their manifest, which ingest fills and training reads, here or on a store that fsspec knows
    (`s3://bucket/shards`); empty is `<run>/shards`. Or ready-made tars: a folder, or patterns with braces and globs
    (`cc3m/{00000..00331}.tar`), with `::` between several sources."""
    caption_key: str = ""
    """Key of a sample's json that holds the caption, or a list of captions from which (seed, epoch, sample) chooses one;
    empty reads the sample's txt."""
    cache_dir: str = ""
    """Folder for local copies of a store's shards; empty is `roclip-shards-<user id>` in the folder for temporary files."""
    cache_bytes: int = 50_000_000_000
    """Bytes that these copies may take on each node; the least recently used goes first. 0 keeps none and reads samples by
    range."""
    min_shards: int = 1
    """Number of shards in the manifest at which training starts, unless ingest ends before."""
    wait_s: float = 600.0
    """Seconds that training waits for `min_shards` before it gives up."""
    max_bad_frac: float = 0.1
    """Share of unreadable samples, among those fetched, above which a shard or an epoch is an error."""
    upsampling: tuple[float, ...] = ()
    """How often an epoch reads each source of `shards`, such as `[1, 2.5]` for two; empty is once each."""
    resampled: bool = False
    """Draw the shards of an epoch with replacement, as webdataset's `resampled` does, instead of reading each once."""
    last_batch: Literal["drop", "pad"] = "drop"
    """What to do at the end of an epoch with samples that do not fill a global batch: `drop` them, or `pad` the batch with
    rows that the loss leaves out."""
    streams: int = 16
    """Number of virtual streams in the order of samples, which does not depend on the number of ranks."""
    shuffle_buffer: int = 1024
    """Number of samples in each stream's seeded shuffle buffer."""
    loader_workers: int = 0
    """Processes a rank that read ahead; 0 reads in the training process."""

    @property
    def fetches(self) -> bool:
        """Whether there is anything to fetch; without it, training takes the shards that are there."""
        return bool(self.urls or self.images or self.scenes)

    def __post_init__(self) -> None:
        positive(self, "data", "min_shards", "streams", "shuffle_buffer", "wait_s")
        if self.dirt != DirtConfig() and not (self.images or self.scenes):
            raise ConfigError(
                f"data.dirt: expected data.images or data.scenes, whose captions can be exchanged, got {self.dirt}. "
                "Leave it out for data of your own."
            )
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
class Strengths:
    """How strongly images and captions are augmented."""

    crop_scale: tuple[float, float]
    """Area of the random crop as a share of the image; (1, 1) turns it off."""
    flip: float
    """Probability of a horizontal flip."""
    jitter: float
    """Largest relative change of brightness, contrast and saturation."""
    jitter_prob: float
    """Probability that an image is jittered."""
    hue: float
    """Largest shift of the hue, in turns of the colour circle, up to 0.5."""
    gray: float
    """Probability of a grey image."""
    blur: float
    """Probability of a Gaussian blur."""
    blur_sigma_frac: tuple[float, float]
    """Smallest and largest sigma of the blur, as shares of the image's side."""
    caption_edit_frac: float
    """Share of a caption's words that one of EDA's edits changes; 0 leaves captions as they are."""
    caption_static: bool
    """Edit a caption once, as the paper does, or afresh each epoch."""


AUGMENT_PRESETS = {
    "mild": Strengths((0.5, 1.0), 0.5, 0.4, 1.0, 0.0, 0.0, 0.0, (1 / 32, 1 / 32), 0.0, False),
    "paper": Strengths((0.08, 1.0), 0.5, 0.5, 0.8, 0.1, 0.2, 1.0, (0.1 / 224, 2 / 224), 0.1, True),
}


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of images and captions, drawn for each (seed, epoch, sample). A null value is the preset's."""

    preset: Literal["mild", "paper"] = "mild"
    """`paper` is what RoCLIP's official code does (SimCLR's operations on images, EDA on captions); `mild` crops and jitters."""
    crop_scale: tuple[float, float] | None = None
    """Area of the random crop as a share of the image; (1, 1) turns it off."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    jitter: float | None = None
    """Largest relative change of brightness, contrast and saturation."""
    jitter_prob: float | None = None
    """Probability that an image is jittered."""
    hue: float | None = None
    """Largest shift of the hue, in turns of the colour circle, up to 0.5."""
    gray: float | None = None
    """Probability of a grey image."""
    blur: float | None = None
    """Probability of a Gaussian blur."""
    blur_sigma_frac: tuple[float, float] | None = None
    """Smallest and largest sigma of the blur, as shares of the image's side."""
    caption_edit_frac: float | None = None
    """Share of a caption's words that one of EDA's edits changes; 0 leaves captions as they are."""
    synonyms: str = ""
    """JSON file {word: [synonyms]} for EDA's replacements and insertions; empty skips these."""

    def strengths(self) -> Strengths:
        """The preset with the keys that are set in its place."""
        preset = AUGMENT_PRESETS[self.preset]
        own = {item.name: getattr(self, item.name) for item in fields(self) if hasattr(preset, item.name)}
        return replace(preset, **{name: value for name, value in own.items() if value is not None})

    def __post_init__(self) -> None:
        strengths = self.strengths()
        fraction(strengths, "augment", "flip", "jitter", "jitter_prob", "gray", "blur", "caption_edit_frac")
        low, high = strengths.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"augment.crop_scale: expected 0 < low <= high <= 1, got {strengths.crop_scale}.")
        low, high = strengths.blur_sigma_frac
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"augment.blur_sigma_frac: expected 0 < low <= high <= 1, got {strengths.blur_sigma_frac}."
            )
        if not 0 <= strengths.hue <= 0.5:
            raise ConfigError(f"augment.hue: expected a turn from 0 to 0.5, got {strengths.hue}.")
