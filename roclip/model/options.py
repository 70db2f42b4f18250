"""The options of open_clip's towers beside their architecture, under open_clip's names: locking, dropout, recomputation."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roclip.config import ModelConfig
from roclip.errors import ConfigError
from roclip.model.batch_norm import converted, frozen_statistics


def check_options(cfg: dict[str, Any], options: ModelConfig) -> None:
    """Raises `ConfigError` for an option that a model with this open_clip config does not support."""
    vision = cfg["vision_cfg"]
    resnet = isinstance(vision.get("layers"), (list, tuple))
    if options.force_patch_dropout and (resnet or "timm_model_name" in vision):
        raise ConfigError("model.force_patch_dropout: only open_clip's own ViT towers drop patches. Leave it unset.")
    if options.lock_image_unlocked_groups and resnet:
        raise ConfigError("model.lock_image_unlocked_groups: a ResNet tower is locked as a whole. Set 0.")
    if options.lock_text and not options.lock_text_freeze_layer_norm and "hf_model_name" not in cfg["text_cfg"]:
        raise ConfigError(
            "model.lock_text_freeze_layer_norm: only a Hugging Face text tower can leave layer norms free. Set true."
        )


def apply_options(clip: Any, options: ModelConfig) -> Any:
    """Apply locking, synchronised batch norm and activation checkpointing to an open_clip model, in place.

    Locked weights have `requires_grad=False`."""
    if options.lock_image:
        clip.lock_image_tower(options.lock_image_unlocked_groups, options.lock_image_freeze_bn_stats)
    if options.lock_text:
        clip.lock_text_tower(options.lock_text_unlocked_layers, options.lock_text_freeze_layer_norm)
    if options.checkpoint_activations:
        clip.set_grad_checkpointing()
        for name in ("layer1", "layer2", "layer3", "layer4"):  # open_clip does not checkpoint ResNet towers
            if type(blocks := getattr(clip.visual, name, None)) is nn.Sequential:
                blocks.__class__ = _Recomputed
    return converted(clip, across_ranks=options.sync_batch_norm, frozen=options.freeze_bn_stats)


class _Recomputed(nn.Sequential):
    """Keeps only the input of each block for the backward pass. The recomputation does not update batch norm statistics."""

    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            if self.training and torch.is_grad_enabled():
                contexts = partial(_recompute_contexts, block)
                input = checkpoint(block, input, use_reentrant=False, context_fn=contexts)  # pyright: ignore
            else:
                input = block(input)
        return input


def _recompute_contexts(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), frozen_statistics(block)
