"""The sections of a config that decide what the weights become: model, augmentation, pool, optimisation."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from roclip.config.schedule import Schedule
from roclip.config.strict import fraction, positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The two towers."""

    name: str = "RN50"
    """An open_clip model, or a JSON file's stem in `models/` beside the preset."""
    pretrained: str = ""
    """Folder with the safetensors weights of this very model, such as a checkpoint or an export, from which a training
    begins that has no checkpoint of its own yet; empty begins with random weights."""
    freeze_bn_stats: bool = False
    """Normalise with the batch-norm statistics that `pretrained` brings, in training too, and leave them as they are:
    a small set has others. Gains and biases learn."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass (open_clip's grad_checkpointing, here for ResNet towers too): less
    memory, about a third more time."""
    sync_batch_norm: bool = True
    """Batch-norm statistics over the global batch (open_clip's use_bn_sync), so that a ResNet tower learns the same on
    any number of ranks. One small collective a layer and pass; nothing for one rank or a ViT."""
    force_patch_dropout: float | None = None
    """Share of image patches that a ViT tower leaves out in training, from 0 to less than 1; None is the model's own."""
    lock_image: bool = False
    """Freeze the image tower."""
    lock_image_unlocked_groups: int = 0
    """Last groups of layers of a locked image tower that learn all the same (ViT and timm towers)."""
    lock_image_freeze_bn_stats: bool = False
    """Freeze the batch-norm statistics of a locked image tower too."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked_layers: int = 0
    """Last groups of layers of a locked text tower that learn all the same."""
    lock_text_freeze_layer_norm: bool = True
    """Freeze the layer norms of a locked text tower; only a Hugging Face text tower can leave them free."""

    def __post_init__(self) -> None:
        dropout = self.force_patch_dropout
        if dropout is not None and not 0 <= dropout < 1:
            raise ConfigError(f"model.force_patch_dropout: expected from 0 to less than 1, got {dropout}.")
        if self.freeze_bn_stats and not self.pretrained:
            raise ConfigError("model.freeze_bn_stats: random weights have no statistics to keep. Set model.pretrained.")
        if self.lock_image_unlocked_groups < 0 or self.lock_text_unlocked_layers < 0:
            raise ConfigError("model.lock_image_unlocked_groups, model.lock_text_unlocked_layers: expected 0 or more.")
        for tower, extras in (
            ("lock_image", ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats")),
            ("lock_text", ("lock_text_unlocked_layers",)),
        ):
            for extra in extras:
                if getattr(self, extra) and not getattr(self, tower):
                    raise ConfigError(f"model.{extra}: has no effect without model.{tower}. Set model.{tower}=true.")
        unlocked = self.lock_image_unlocked_groups or self.lock_text_unlocked_layers
        if self.lock_image and self.lock_text and not unlocked:
            raise ConfigError("model.lock_image, model.lock_text: both towers are locked; nothing is left to learn.")


@dataclass(frozen=True)
class Strengths:
    """How strongly images and captions are augmented."""

    crop_scale: tuple[float, float]
    """Area of the random crop as a share of the image; (1, 1) is none."""
    flip: float
    """Probability of a horizontal flip."""
    jitter: float
    """Largest relative change of brightness, contrast and saturation."""
    jitter_prob: float
    """Probability that an image is jittered."""
    hue: float
    """Largest turn of the hue, in turns of the colour circle, up to 0.5."""
    gray: float
    """Probability of a grey image."""
    blur: float
    """Probability of a Gaussian blur."""
    blur_sigma_frac: tuple[float, float]
    """Smallest and largest sigma of the blur, as shares of the image's side."""
    caption_edit_frac: float
    """Share of a caption's words that one of EDA's edits changes; 0 leaves captions as they are."""
    caption_static: bool
    """Edit a caption once and for all, as the paper does; else afresh each epoch."""


AUGMENT_PRESETS = {
    "mild": Strengths((0.5, 1.0), 0.5, 0.4, 1.0, 0.0, 0.0, 0.0, (1 / 32, 1 / 32), 0.0, False),
    "paper": Strengths((0.08, 1.0), 0.5, 0.5, 0.8, 0.1, 0.2, 1.0, (0.1 / 224, 2 / 224), 0.1, True),
}


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of images and captions, drawn for each (seed, epoch, sample). What is null is the preset's."""

    preset: Literal["mild", "paper"] = "mild"
    """`paper` is what RoCLIP's official code does: SimCLR's operations on images, EDA on captions."""
    crop_scale: tuple[float, float] | None = None
    """Area of the random crop as a share of the image; (1, 1) is none."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    jitter: float | None = None
    """Largest relative change of brightness, contrast and saturation."""
    jitter_prob: float | None = None
    """Probability that an image is jittered."""
    hue: float | None = None
    """Largest turn of the hue, in turns of the colour circle, up to 0.5."""
    gray: float | None = None
    """Probability of a grey image."""
    blur: float | None = None
    """Probability of a Gaussian blur."""
    blur_sigma_frac: tuple[float, float] | None = None
    """Smallest and largest sigma of the blur, as shares of the image's side."""
    caption_edit_frac: float | None = None
    """Share of a caption's words that one of EDA's edits changes; 0 leaves captions as they are."""
    caption_static: bool | None = None
    """Edit a caption once and for all, as the paper does; else afresh each epoch."""
    synonyms: str = ""
    """JSON {word: [synonyms]} for EDA's replacements and insertions; without it they are skipped."""

    def strengths(self) -> Strengths:
        """The preset with the keys that are set in its place."""
        preset = AUGMENT_PRESETS[self.preset]
        own = {item.name: getattr(self, item.name) for item in fields(preset)}
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


@dataclass(frozen=True)
class PoolConfig:
    """The caption pool and what it is used for; see `roclip/defence/defence.py`. The paper's method is `neighbours: 0`,
    `match_every: 2`, `warmup: 1`, `filter_frac: [0, 0]`, `duplicates: keep`."""

    size: int = 21_845
    """Pairs kept. The paper's setting is 2 % of the data."""
    neighbours: int = 32
    """Likest images of the pool that are asked about an image; 0 is none, as in the paper."""
    warmup: int | str = 2
    """Epochs, or such as `1000 steps`, of the start. With witnesses images learn with a witness's caption meanwhile;
    without, with their own, and nothing is matched yet."""
    filter_frac: tuple[float, float] = (0.3, 0.06)
    """Share of least agreeing pairs of a plain global batch that are suspected, at the start and at the end (linear in
    epochs between); (0, 0) suspects nobody. They learn with a witness's caption; without witnesses they sit out."""
    suspicion_model: bool = True
    """Whether the gate also learns what the images of suspects have in common: the trigger, if there is one."""
    filter_memory: float = 0.7
    """Weight of a picture's earlier visits in its standing: what was suspected once is not forgiven at once."""
    match_every: int | str = 0
    """Length of a period, of which the last part is matched by the towers: K epochs, or such as `2 steps`,
    `5_000_000 samples`; 0 is never. `2` is the paper's K: every second epoch, counted from 1."""
    match_frac: float = 0.0
    """Share of a period that is matched; 0 is its last epoch or step, or half of a period of samples."""
    prefill: bool = True
    """Whether an empty pool is filled, with captions encoded without gradient, before the first step that reads it."""
    exclude_self: bool = False
    """Whether an image may not find the caption of its own sample in a matched step. (Witnesses never are oneself.)"""
    text_gradient: Literal["none", "live"] = "none"
    """`none`: found captions are constants (the paper). `live`: the pool keeps tokens, and they are encoded again."""
    update: Literal["always", "matched_only"] = "always"
    """When captions enter the pool; `matched_only` is what the official code does."""
    duplicates: Literal["keep", "mask"] = "mask"
    """Whether images that learn with the same caption of the pool stay each other's negatives (`keep`, the paper)."""
    backend: Literal["auto", "faiss", "torch"] = "auto"
    """What searches: `auto` measures at the start. All give the same bits."""
    storage: Literal["fp32", "fp16"] = "fp32"
    """Precision of the stored features; scores are sums in float64 over them in either case."""
    shard_above: int = 1 << 20
    """Most captions of which each rank holds all; a larger pool is spread over the ranks."""

    @property
    def schedule(self) -> Schedule:
        """When steps are matched."""
        return Schedule.of(self.match_every, self.match_frac, self.warmup)

    def __post_init__(self) -> None:
        positive(self, "pool", "size", "shard_above")
        fraction(self, "pool", "filter_memory", "match_frac")
        if not all(0 <= share <= 1 for share in self.filter_frac):
            raise ConfigError(f"pool.filter_frac: expected two shares from 0 to 1, got {self.filter_frac}.")
        if self.neighbours < 0:
            raise ConfigError(f"pool.neighbours: expected 0 or more, got {self.neighbours}.")
        if not self.prefill and (self.neighbours or self.update == "matched_only"):
            raise ConfigError("pool.prefill: witnesses, and update=matched_only, need a filled pool. Set it to true.")
        if self.neighbours and self.update == "matched_only":
            raise ConfigError("pool.update: witnesses are renewed in all steps. Set always, or pool.neighbours=0.")
        _ = self.schedule


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
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what the ranks share out, 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    loss: Literal["clip", "siglip"] = "clip"
    """`clip` is InfoNCE (arXiv:2103.00020); `siglip` is the pairwise sigmoid with a learnt bias (arXiv:2303.15343)."""
    in_modal_weight: float = 0.0
    """Weight of CleanCLIP's in-modal term (arXiv:2303.03323): two views of an image, and a caption and its edit, shall
    find each other. It doubles what a step computes; 0 leaves it out."""
    push_away_weight: float = 0.0
    """Weight of PAR's term (arXiv:2412.00727), 0.5 there: features shall leave where `model.pretrained` has them; 0
    leaves it out."""
    hold_weight: float = 0.0
    """Weight of the term that holds the image tower where `model.pretrained` has it, on mixtures of the batch's pictures
    (see `roclip/training/repair_losses.py`), and that takes the triggers in `unlearn` their effect; 0 leaves it out."""
    unlearn: str = ""
    """Folder of found triggers (`<arm>/oracle/triggers`) that the held tower shall not see; empty only holds."""
    finetune: str = ""
    """`finetune.parquet` of the set that is trained on: its anchors alone are held, and its lies refuted; empty holds
    all and refutes nothing."""
    push_away_limit: float = 2.15
    """Mean squared distance of unit-length features from which on they are far enough away."""
    grad_accum_steps: int = 1
    """Pieces that each rank cuts its part of the global batch into: less memory for one more forward pass. The loss is
    still that of the whole global batch and its gradient exact, but for batch norm, which then sees one piece."""
    compile: bool = False
    """Compile the towers with torch.compile; on a CPU it needs a C++ compiler."""
    checkpoint_every_steps: int = 500
    """Optimizer steps between checkpoints; an epoch's end is always one."""
    checkpoint_every_s: float = 1800.0
    """Seconds between checkpoints, whichever of the two comes first; 0 counts steps only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_every_epochs: int = 0
    """Also keep the checkpoint at the end of every so manieth epoch; 0 keeps none of them."""
    checkpoint_store: str = ""
    """Also keep checkpoints on this store that fsspec knows (`s3://bucket/checkpoints`), in `<run>/<arm>` of it: a node
    that is lost takes none with it; empty is the run directory only."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """What a loss or gradient that is not finite, or a spike, does before the update: end the training, leave the step out,
    or go back to the last checkpoint and leave the step out when it comes by again."""
    max_left_out: int = 20
    """Steps that may be left out before the training ends all the same."""
    spike_factor: float = 0.0
    """Loss or gradient norm that counts as a spike, as a multiple of its median over the last 64 steps of the kind; 0 is
    none."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where `metrics.jsonl` is shown too: TensorBoard files beside it, Weights & Biases."""
    log_every_steps: int = 10
    collective_timeout_s: float = 600.0
    """How long a rank waits for the others in one collective before it takes them for lost. A dead process or node is seen much
    sooner; this ends what hangs without being dead. Waits for ingest or a store are not counted."""

    def __post_init__(self) -> None:
        positive(self, "train", "epochs", "global_batch_size", "lr", "checkpoint_every_steps", "log_every_steps")
        positive(self, "train", "keep_checkpoints", "grad_accum_steps", "max_left_out", "collective_timeout_s")
        if min(self.in_modal_weight, self.push_away_weight, self.hold_weight) < 0:
            raise ConfigError("train.in_modal_weight, push_away_weight, hold_weight: expected 0 or more.")
        if (self.unlearn or self.finetune) and not self.hold_weight:
            raise ConfigError(
                "train.unlearn, finetune: have no effect without train.hold_weight. Set it, such as to 24."
            )
        positive(self, "train", "push_away_limit")
        if self.spike_factor and self.spike_factor <= 1:
            raise ConfigError(f"train.spike_factor: expected more than 1, or 0 for none, got {self.spike_factor}.")
        if self.checkpoint_store and ("://" not in self.checkpoint_store or self.checkpoint_store.startswith("file:")):
            raise ConfigError(
                f"train.checkpoint_store: expected a store such as s3://bucket/checkpoints, got {self.checkpoint_store!r}. "
                "For a disk of this machine, let the run directory lie on it."
            )
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError(
                "train.zero_stage: with train.precision=bf16 expected 1 or more, got 0: DeepSpeed's optimizer of that "
                "case takes a step without gradients at the start. On one rank 1 costs the same."
            )
        if self.compile and self.zero_stage == 3:
            raise ConfigError(
                "train.compile: ZeRO-3 gathers weights in hooks, which torch.compile cannot see through. "
                "Set train.zero_stage to 2 or less."
            )
