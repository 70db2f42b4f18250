"""The optimisation, its checkpoints and its logs."""

from dataclasses import dataclass
from typing import Literal

from roclip.config.strict import positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = 24
    """Passes over the data."""
    global_batch_size: int = 512
    """Number of pairs a step, over all ranks."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's two running means."""
    eps: float = 1e-6
    """Term that keeps AdamW's denominator from 0."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly; then it falls to zero along a cosine."""
    grad_clip_norm: float = 0.0
    """Norm that the global gradient is clipped to; 0 turns clipping off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of weights and activations."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage, which says what is divided among the ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also
    weights."""
    loss: Literal["clip", "siglip"] = "clip"
    """`clip` is InfoNCE (arXiv:2103.00020); `siglip` is the pairwise sigmoid loss with a learnt bias (arXiv:2303.15343)."""
    objective: Literal["contrastive", "repair"] = "contrastive"
    """`contrastive` trains with `loss` alone; `repair` adds the terms that the section `repair` weights, for a model that
    begins from `model.pretrained`."""
    grad_accum_steps: int = 1
    """Number of pieces into which each rank cuts its part of the global batch: more pieces need less memory, for one more
    forward pass. Loss and gradient are those of the whole global batch, except that batch norm sees one piece at a time."""
    compile: bool = False
    """Compile the towers with torch.compile, which needs a C++ compiler on a CPU."""
    checkpoint_every_steps: int = 500
    """Optimizer steps between checkpoints; the end of an epoch always has one."""
    checkpoint_every_s: float = 1800.0
    """Seconds between checkpoints, if that is sooner than `checkpoint_every_steps`; 0 counts steps only."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every_epochs: int = 0
    """Also keep the checkpoint at the end of every N-th epoch; 0 keeps none of these."""
    checkpoint_store: str = ""
    """Store that fsspec knows (such as `s3://bucket/checkpoints`) to copy checkpoints to, in its folder `<run>/<arm>`, so
    that none is lost with a node; empty keeps them in the run directory only."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """What to do, before the update, about a loss or gradient that is not finite or that spikes: `stop` training, `skip` the
    step, or `rollback` to the last checkpoint and skip the step on the way back."""
    max_left_out: int = 20
    """Number of skipped steps after which training ends nevertheless."""
    spike_factor: float = 0.0
    """Loss or gradient norm that counts as a spike, as a multiple of its median over the last 64 steps of the same kind; 0
    turns this off."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers that mirror `metrics.jsonl`: TensorBoard files beside it, Weights & Biases."""
    log_every_steps: int = 10
    """Optimizer steps between lines of `metrics.jsonl`."""
    collective_timeout_s: float = 600.0
    """Seconds that a rank waits for the others in one collective before it considers them lost. A dead process or node is
    noticed much sooner; this ends what hangs. Waiting for ingest or a store does not count."""

    def __post_init__(self) -> None:
        positive(self, "train", "epochs", "global_batch_size", "lr", "checkpoint_every_steps", "log_every_steps")
        positive(self, "train", "keep_checkpoints", "grad_accum_steps", "max_left_out", "collective_timeout_s")
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
