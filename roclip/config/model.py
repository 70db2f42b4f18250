"""The two towers of a CLIP model."""

from dataclasses import dataclass

from roclip.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The two towers."""

    name: str = "RN50"
    """Name of an open_clip model, or of a JSON file (without its suffix) in `models/` beside the preset."""
    pretrained: str = ""
    """Folder with safetensors weights of the same model, such as a checkpoint or an export, to begin from when there is no
    checkpoint yet; empty begins with random weights."""
    freeze_bn_stats: bool = False
    """Keep the batch-norm statistics of `pretrained` and normalise with them in training too, as those of a small set would
    differ. Gains and biases learn."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass (open_clip's grad_checkpointing, here for ResNet towers too), which saves
    memory and takes about a third more time."""
    sync_batch_norm: bool = True
    """Take batch-norm statistics over the global batch (open_clip's use_bn_sync), so that a ResNet tower learns the same on
    any number of ranks. It costs one small collective a layer and pass, and nothing for one rank or a ViT."""
    force_patch_dropout: float | None = None
    """Share of image patches that a ViT tower drops in training, from 0 to less than 1; null is the model's own."""
    lock_image: bool = False
    """Freeze the image tower."""
    lock_image_unlocked_groups: int = 0
    """Number of last groups of layers of a locked image tower that still learn (ViT and timm towers)."""
    lock_image_freeze_bn_stats: bool = False
    """Also freeze the batch-norm statistics of a locked image tower."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked_layers: int = 0
    """Number of last groups of layers of a locked text tower that still learn."""
    lock_text_freeze_layer_norm: bool = True
    """Also freeze the layer norms of a locked text tower; only a Hugging Face text tower can leave them free."""

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
