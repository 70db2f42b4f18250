"""Additional loss terms that repair a model: CleanCLIP's and PAR's, which need no trigger, and the distillation and unlearning
terms of `roclip.training.distillation`, which use found triggers and known lies.

Letters: B local batch, N kept pairs of the global batch, D feature width, L caption tokens.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roclip import distributed
from roclip.config import Config
from roclip.data.augment import augment
from roclip.data.eda import CaptionEdits, read_synonyms
from roclip.data.stream import Batch
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.accumulate import Backward
from roclip.training.distillation import Distillation
from roclip.training.losses import clip_loss

SECOND_VIEW = 1 << 32
"""Added to the seed for the augmentation and the caption edits of the second view."""
PUSH_AWAY_LIMIT = 2.15
"""Mean squared distance of unit-length features at which PAR's term stops."""
EDIT_FRAC = 0.1
"""Share of words that the second view's edit changes where `augment.caption_edit_frac` is 0: EDA's default."""


def in_modal_loss(
    images: Tensor, other_images: Tensor, texts: Tensor, other_texts: Tensor, logit_scale: Tensor, keep: Tensor
) -> Tensor:
    """CleanCLIP's in-modal term: InfoNCE between two views of each image, and between two views of each caption.

        L = 1/2 (InfoNCE(x, x') + InfoNCE(t, t')),  InfoNCE as in `clip_loss`, over the kept pairs

    Args:
        images, other_images, texts, other_texts: (B, D), unit length.
        logit_scale: exp of the learnt log scale.
        keep: (B,) bool.

    Source: CleanCLIP (arXiv:2303.03323) eq. 2, which is one-directional; here both directions, as in all losses.
    """
    image_term = clip_loss(images, other_images, logit_scale, keep)
    return (image_term + clip_loss(texts, other_texts, logit_scale, keep)) / 2


def push_away_loss(features: Tensor, before: Tensor, limit: float, keep: Tensor) -> Tensor:
    """PAR's term for one tower, to be minimised: moves features away from where they were, up to a limit.

        L = -d if d <= limit else 0,  d = 1/N sum_i keep_i |x_i - x0_i|^2

    where x0 are the features of the model before the repair, and the mean is over the global batch: the value is this rank's
    share times the world size, as in `clip_loss`.

    Args:
        features, before: (B, D), unit length, so that d is at most 4.

    Source: Perturb and Recover (arXiv:2412.00727), following the authors' code, in which the limit applies to the mean distance.
    """
    distances = (features - before).square().sum(dim=1) * keep
    total, kept = distributed.all_sum(torch.stack([distances.detach().sum(), keep.sum().to(distances.dtype)]))
    near = total <= limit * kept
    return -distances.sum() * near * distributed.world_size() / kept.clamp(min=1)


class RepairLosses:
    """A forward pass whose `backward` adds the weighted terms to the loss.

    Args:
        config: Its section `repair`, with the weights of the terms, and `model.pretrained`. The unlearning term has weight 1.
        image_size: Side of the tower's input, in pixels.
    """

    def __init__(self, config: Config, image_size: int, device: torch.device):
        self.config, self.image_size = config, image_size
        self.edit = _second_edit(config) if config.repair.in_modal_weight else None
        self.before, self.distillation = None, None
        settings = config.repair
        if settings.push_away_weight or settings.distillation_weight:
            self.before = Towers.load(Path(config.model.pretrained)).requires_grad_(False).to(device)
            if settings.distillation_weight:
                self.distillation = Distillation(
                    self.before, settings.triggers, settings.finetune, config.seed, image_size
                )

    def forward(
        self,
        engine: Any,
        images: Tensor,
        tokens: Tensor,
        *,
        batch: Batch,
        epoch: int,
        pieces: int = 1,
        text_gradient: bool = True,
    ) -> tuple[tuple[Tensor, ...], Backward]:
        """As `accumulate.forward`, for `images` (B, 3, H, W) and `tokens` (B, L), which were augmented from `batch`."""
        settings, rows = self.config.repair, len(images)
        both_images, both_tokens = images, tokens
        if batch.edited is not None:
            both_images = torch.cat([images, self._second_view(batch, epoch).to(images)])
            both_tokens = torch.cat([tokens, batch.edited.to(tokens)])
        views_start = len(both_images)
        views = None
        if self.distillation is not None:
            mixed, stamped, kept = self.distillation.views(batch, epoch)
            views = mixed.to(images), stamped.to(images), kept.to(images.device)
            both_images = torch.cat([both_images, *views[:2]])
        (image_features, text_features, scale, *bias), inner = accumulate.forward(
            engine, both_images, both_tokens, pieces=pieces, text_gradient=text_gradient
        )
        x, t, keep = image_features[:rows], text_features[:rows], batch.valid.to(images.device)

        def backward(loss: Tensor) -> None:
            if batch.edited is not None:
                other_x, other_t = image_features[rows:views_start], text_features[rows:views_start]
                loss = loss + settings.in_modal_weight * in_modal_loss(x, other_x, t, other_t, scale, keep)
            if self.distillation is not None and views is not None:
                mixed, _, kept = views
                clean, triggered = image_features[views_start:].chunk(2)
                held = self.distillation.distillation_loss(clean, triggered, mixed, kept)
                loss = loss + settings.distillation_weight * held
                loss = loss + self.distillation.unlearning_loss(x, batch)
            if self.before is not None and settings.push_away_weight:
                with torch.no_grad():
                    x0, t0 = self.before.encode_image(images), self.before.encode_text(tokens)
                away = push_away_loss(x, x0, PUSH_AWAY_LIMIT, keep)
                away = away + push_away_loss(t, t0, PUSH_AWAY_LIMIT, keep)
                loss = loss + settings.push_away_weight * away
            inner(loss)

        return (x, t, scale, *bias), backward

    def _second_view(self, batch: Batch, epoch: int) -> Tensor:
        seed = self.config.seed + SECOND_VIEW
        return augment(batch.images, batch.ids, self.config.augment, seed=seed, epoch=epoch, size=self.image_size)


def wants_repair(config: Config) -> bool:
    """Whether the training's objective has the repair's terms."""
    return config.train.objective == "repair"


def _second_edit(config: Config) -> CaptionEdits:
    frac = config.augment.strengths().caption_edit_frac or EDIT_FRAC
    synonyms = read_synonyms(Path(config.augment.synonyms)) if config.augment.synonyms else {}
    return CaptionEdits(config.seed + SECOND_VIEW, frac, synonyms=synonyms)
