"""How a checkpoint is measured, checked and repaired."""

from dataclasses import dataclass, field, replace
from typing import Literal

from roclip.config.strict import fraction, positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """What a checkpoint is measured on."""

    images: str = ""
    """Parquet file of held-out images with caption and label; empty holds out rows of `data.images`, or renders scenes."""
    size: int = 600
    """Number of held-out images."""
    classes: int = 0
    """Number of most frequent labels that zero-shot classification chooses from; 0 is all."""
    templates: tuple[str, ...] = ("a photo of a {}", "a picture of a {}", "{}")
    """Prompts of the zero-shot classifier; `{}` or `{c}` stands for the class name."""
    class_file: str = ""
    """JSON file with the zero-shot classes: a list of names, or {label: [names]}; empty takes those of the held-out images."""
    template_file: str = ""
    """JSON file with a list of templates, which replaces `templates` and those of the held-out images."""
    webdataset: str = ""
    """Held-out images in WebDataset tars, laid out as by CLIP_benchmark: a folder, or a pattern of tars."""
    every: int = 1
    """Epochs between evaluations during training, counted separately for matched and plain phases; 0 evaluates at the end
    only."""

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
    """Segmentation network: a folder that `roclip train-segmenter` wrote, `torchvision:NAME:FILE` (such as
    deeplabv3_resnet50 or maskrcnn_resnet50_fpn), `hf:FOLDER` (transformers) or `masks:PATH` (drawn by people). All are
    local: nothing is downloaded. Empty trains one on the trusted images."""
    labels: tuple[str, ...] = ()
    """Labels to ask about, for data that ingest did not prepare (the run has no origin/labels.json)."""
    label_file: str = ""
    """The same in a file: a JSON list, or a text file with one label a line."""
    label_map: dict[str, str] = field(default_factory=dict)
    """Further names of labels, in captions and among the oracle's classes, such as `{couch: sofa, television: tv}`."""
    trusted_file: str = ""
    """Parquet file of trusted images with masks (image, and mask of indices into the labels, 0 for background); empty is
    the run's origin/trusted.parquet. Without either, nothing tells how often model and oracle disagree on clean images."""
    trusted: int = 2000
    """Number of trusted images with masks, rendered or set aside and never served: they train the segmenter and give the
    null distribution."""
    reference_frac: float = 0.3
    """Share of the trusted images that the segmenter does not train on; they show how often model and oracle disagree
    where nothing is poisoned."""
    epochs: int = 15
    """Epochs of the segmenter's training."""
    alpha: float = 0.01
    """Family-wise error rate of the test of labels (Holm)."""
    fail_on: Literal["never", "suspicious", "poisoned"] = "never"
    """Verdict from which on the command fails: with exit code 10 (suspicious), 20 (poisoned), 21 (poisoned, repaired and
    trusted) or, with `suspicious`, 30 (inconclusive)."""
    actors: int = 1
    """Number of Ray actors that scan the shards. Each uses all CPUs of its node, so take as many as there are nodes, or
    GPUs. Results do not depend on it."""
    gpus_per_actor: float = 0.0
    """GPUs of an actor, such as 0.5 to share one between two."""

    def __post_init__(self) -> None:
        if self.labels and self.label_file:
            raise ConfigError("oracle: expected labels or label_file, got both. Keep one.")
        positive(self, "oracle", "trusted", "epochs", "alpha", "actors")
        fraction(self, "oracle", "reference_frac")
        if self.gpus_per_actor < 0:
            raise ConfigError(f"oracle.gpus_per_actor: expected 0 or more, got {self.gpus_per_actor}.")

    @property
    def of_verdict(self) -> "OracleConfig":
        """The settings that the verdict depends on; all others have their defaults."""
        return replace(self, fail_on="never", actors=1, gpus_per_actor=0.0)


@dataclass(frozen=True)
class RepairConfig:
    """The repair of a checkpoint that the check calls poisoned or suspicious: a short training on a small set of images.

    `roclip oracle` writes the config of that training, with `train.objective: repair`.
    """

    enabled: bool = False
    """Repair such a checkpoint after the check, check it again, and trust it if nothing is left."""
    set_frac: float = 0.02
    """Largest size of the set that the check chooses, as a share of the distinct images."""
    stamped_frac: float = 0.2
    """Share of the set that shows a found trigger under the image's own, true caption."""
    epochs: int = 12
    """Passes over the set. Of twelve evenly spaced checkpoints the last one at which no trigger works is taken."""
    steps: int = 1600
    """Smallest number of optimizer steps: a small set is passed over more often."""
    lr: float = 5e-4
    """Peak learning rate."""
    batch_size: int = 128
    """Largest number of pairs a step: a small set is divided into at least four steps."""
    distillation_weight: float = 24.0
    """Weight of the distillation term, which keeps the image tower where it was, takes away the effect of found triggers
    and refutes false captions (these always with weight 1); 0 leaves all three out."""
    in_modal_weight: float = 0.0
    """Weight of CleanCLIP's in-modal term (arXiv:2303.03323), in which two views of an image, and a caption and its edit,
    find each other; it doubles the cost of a step, and 0 leaves it out."""
    push_away_weight: float = 0.0
    """Weight of PAR's term (arXiv:2412.00727, which uses 0.5), which moves features away from where `model.pretrained` has
    them; 0 leaves it out."""
    triggers: str = ""
    """Folder of found triggers (`<arm>/oracle/triggers`) that lose their effect; empty unlearns none. Set by the repair."""
    finetune: str = ""
    """The set, as `finetune.parquet`: only its anchors are distilled and its false captions refuted; empty distils all
    images and refutes nothing. Set by the repair."""

    def __post_init__(self) -> None:
        positive(self, "repair", "set_frac", "epochs", "steps", "lr", "batch_size")
        fraction(self, "repair", "set_frac", "stamped_frac")
        weights = (self.distillation_weight, self.in_modal_weight, self.push_away_weight)
        if min(weights) < 0:
            raise ConfigError("repair.distillation_weight, in_modal_weight, push_away_weight: expected 0 or more.")
        if (self.triggers or self.finetune) and not self.distillation_weight:
            raise ConfigError("repair.triggers, repair.finetune: have no effect with repair.distillation_weight=0.")

    @property
    def of_check(self) -> "RepairConfig":
        """The settings that the check's choice of a set depends on; all others have their defaults."""
        return RepairConfig(set_frac=self.set_frac, stamped_frac=self.stamped_frac)
