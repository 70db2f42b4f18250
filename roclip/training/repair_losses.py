"""Further terms of the loss, for repairing a model: CleanCLIP's and PAR's, which need no trigger, and
`roclip.training.distillation`, which takes found triggers their effect and refutes lies.

A training that wants none does not come here. Letters: B local batch, N kept pairs of the global batch, D feature
width, L caption tokens.
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
"""Added to the seed of what makes the second view."""
PUSH_AWAY_LIMIT = 2.15
"""Mean squared distance of unit-length features at which PAR's term stops."""
EDIT_FRAC = 0.1
"""Share of words that the edit changes where `augment.caption_edit_frac` leaves captions as they are: EDA's own."""


def in_modal_loss(
    images: Tensor, other_images: Tensor, texts: Tensor, other_texts: Tensor, logit_scale: Tensor, keep: Tensor
) -> Tensor:
    """CleanCLIP's in-modal term: each of an image's two views shall find the other among the batch, and each of a caption's.

        L = 1/2 (InfoNCE(x, x') + InfoNCE(t, t')),  InfoNCE as in `clip_loss`, over the kept pairs

    Args:
        images, other_images, texts, other_texts: (B, D), unit length.
        logit_scale: exp of the learnt log scale.
        keep: (B,) bool.

    Source: CleanCLIP (arXiv:2303.03323) eq. 2, which searches in one direction only; here both, as everywhere else.
    """
    image_term = clip_loss(images, other_images, logit_scale, keep)
    return (image_term + clip_loss(texts, other_texts, logit_scale, keep)) / 2


def push_away_loss(features: Tensor, before: Tensor, limit: float, keep: Tensor) -> Tensor:
    """PAR's term of one tower, to be minimised.

        L = -d if d <= limit else 0,  d = 1/N sum_i keep_i |x_i - x0_i|^2

    where x0 are the features of the model before the repair. Of the global batch, as `clip_loss`: the value is this
    rank's share times the world size.

    Args:
        features, before: (B, D), unit length, so that d is at most 4.

    Source: Perturb and Recover (arXiv:2412.00727), as its authors' code has it: the mean distance is what is limited.
    """
    distances = (features - before).square().sum(dim=1) * keep
    total, kept = distributed.all_sum(torch.stack([distances.detach().sum(), keep.sum().to(distances.dtype)]))
    near = total <= limit * kept
    return -distances.sum() * near * distributed.world_size() / kept.clamp(min=1)


class RepairLosses:
    """A forward pass whose `backward` adds the terms, by their weights, to the loss that it is given.

    Args:
        config: Its section `repair`, with the weights of the terms, and `model.pretrained`. What is refuted weighs as
            much as the loss itself.
        image_size: Side of the tower's input, in pixels.
    """

    def __init__(self, config: Config, image_size: int, device: torch.device):
        self.config, self.image_size = config, image_size
        self.edit = _second_edit(config) if config.repair.in_modal_weight else None
        self.before, self.hold = None, None
        settings = config.repair
        if settings.push_away_weight or settings.distillation_weight:
            self.before = Towers.load(Path(config.model.pretrained)).requires_grad_(False).to(device)
            if settings.distillation_weight:
                self.hold = Distillation(self.before, settings.triggers, settings.finetune, config.seed, image_size)

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
        """As `accumulate.forward`, of `images` (B, 3, H, W) and `tokens` (B, L), augmented from `batch`."""
        settings, rows = self.config.repair, len(images)
        both_images, both_tokens = images, tokens
        if batch.edited is not None:
            both_images = torch.cat([images, self._second_view(batch, epoch).to(images)])
            both_tokens = torch.cat([tokens, batch.edited.to(tokens)])
        seen = len(both_images)
        views = None
        if self.hold is not None:
            mixed, stamped, kept = self.hold.views(batch, epoch)
            views = mixed.to(images), stamped.to(images), kept.to(images.device)
            both_images = torch.cat([both_images, *views[:2]])
        (image_features, text_features, scale, *bias), inner = accumulate.forward(
            engine, both_images, both_tokens, pieces=pieces, text_gradient=text_gradient
        )
        x, t, keep = image_features[:rows], text_features[:rows], batch.valid.to(images.device)

        def backward(loss: Tensor) -> None:
            if batch.edited is not None:
                other_x, other_t = image_features[rows:seen], text_features[rows:seen]
                loss = loss + settings.in_modal_weight * in_modal_loss(x, other_x, t, other_t, scale, keep)
            if self.hold is not None and views is not None:
                mixed, _, kept = views
                held, unseen = image_features[seen:].chunk(2)
                loss = loss + settings.distillation_weight * self.hold.loss(held, unseen, mixed, kept)
                loss = loss + self.hold.refute(x, batch)
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


def repair_losses(config: Config, towers: Towers, device: torch.device) -> RepairLosses | None:
    """The terms of a config whose `train.objective` is a repair, otherwise None."""
    if config.train.objective != "repair":
        return None
    return RepairLosses(config, towers.image_size, device)


def _second_edit(config: Config) -> CaptionEdits:
    frac = config.augment.strengths().caption_edit_frac or EDIT_FRAC
    synonyms = read_synonyms(Path(config.augment.synonyms)) if config.augment.synonyms else {}
    return CaptionEdits(config.seed + SECOND_VIEW, frac, synonyms=synonyms)
