"""Loss terms of a repair by distillation: the image tower unlearns found triggers and memorised lies, and is otherwise held to
the tower before the repair.

    distillation   1/N sum_i [ (1 - x(m_i) . x0(m_i)) + STAMPED_WEIGHT (1 - x(s_i) . x0(m_i)) ]
    unlearning     1/V sum_v log(1 + exp(s (x_v . t(lie_v) - x_v . t(truth_v))))

x0 is the tower before, m_i a mixture of two images of the batch, and s_i the same mixture with a found trigger on it. A compact
set has few images, which the model has memorised, but their mixtures are practically unlimited, and x0 gives a target for each.
So the tower is held to x0 in general, and not only on the set.

Of a repair's set only the anchors are distilled, on which model, oracle and caption agree: what the model says about a victim
has to change. A victim's new caption alone does not always change it, as a batch may have no caption that states the lie. So the
unlearning term contrasts a victim v with the zero-shot weights t of its truth and its lie, at the logit scale s of the model
before.

Letters: B local batch, D feature width, V repaired victims and N anchor mixtures of the global batch, v = `VIEWS` B mixtures,
H side of the stored images and S side of the tower's input, in pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from roclip import distributed
from roclip.config import AugmentConfig
from roclip.data.augment import augment
from roclip.data.stream import Batch
from roclip.errors import DataError
from roclip.found_triggers import FoundTrigger, load_triggers
from roclip.model.towers import Encoder, Towers

VIEWS = 2
STAMPED_WEIGHT = 0.5
MIXED_FRAC = 0.6
"""Share of the views that are mixtures: half of them CutMix (arXiv:1905.04899), half mixup (arXiv:1710.09412)."""
_VIEW = AugmentConfig(crop_scale=(0.7, 1.0), flip=0.5, jitter=0.3)
_SEED = 2 << 32


class Distillation:
    """Makes the views of a batch, and computes both terms of the loss."""

    def __init__(self, before: Towers, triggers: str, finetune: str, seed: int, image_size: int):
        """
        Args:
            before: The towers before the repair.
            triggers: Folder written by `save_triggers`; empty distils without triggers.
            finetune: The set's parquet (sample, role, truths, lies); empty distils every image and unlearns nothing.
            image_size: S, in pixels.

        Raises `DataError` for a set that cannot be read.
        """
        self.before, self.seed, self.image_size = before, seed, image_size
        self.triggers = load_triggers(Path(triggers)) if triggers else ()
        rows = _read_set(Path(finetune)) if finetune else []
        self.anchors = _sample_ids([row for row in rows if row["role"] == "anchor"]) if finetune else None
        victims = [row for row in rows if row["lies"]]
        self.victims = _sample_ids(victims)
        encoder, device = Encoder(before), next(before.parameters()).device
        weights = {tuple(row[column]): torch.empty(0) for row in victims for column in ("truths", "lies")}
        for prompts in weights:
            weights[prompts] = F.normalize(encoder.texts(prompts).mean(dim=0), dim=0)
        differences = [weights[tuple(row["lies"])] - weights[tuple(row["truths"])] for row in victims]
        stacked = torch.stack(differences).to(device) if differences else torch.empty(0, 1, device=device)
        self.lie_directions = before.logit_scale.detach().float().exp() * stacked
        """(victims of the set, D): s (t(lie) - t(truth))."""

    def views(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mixtures of the batch's anchors, the same mixtures with a trigger on them, and which of them enter the loss.

        Each anchor is the first image of equally many mixtures, give or take one. A batch without anchors gives mixtures of
        all its images, none of which enters the loss.

        Returns:
            (v, 3, S, S) in [0, 1] twice, equal where there are no triggers, and (v,) bool.
        """
        anchors = self.is_anchor(batch)
        rows = (anchors if anchors.any() else torch.ones_like(anchors)).nonzero().flatten()
        wanted, side = VIEWS * len(batch.images), batch.images.shape[-1]
        images, ids = batch.images[rows], batch.ids[rows]
        mixed, stamped = [], []
        for shift in range(1, -(-wanted // len(rows)) + 1):
            seed = self.seed + shift * _SEED
            pixels = augment(images, ids, _VIEW, seed=seed, epoch=epoch, size=side).cpu()
            for n in range(min(len(rows), wanted - len(mixed))):
                rng = np.random.default_rng((seed, epoch, int(ids[n])))
                mixed.append(mixture(pixels[n], pixels[(n + shift) % len(rows)], rng))
                stamped.append(stamp(mixed[-1], self.triggers, rng))
        return self._resized(mixed), self._resized(stamped), anchors.any().expand(wanted)

    def distillation_loss(self, mixed: Tensor, stamped: Tensor, views: Tensor, kept: Tensor) -> Tensor:
        """The distillation term of the global batch: this rank's share times the world size.

        Args:
            mixed, stamped: (v, D) features of the mixtures without and with a trigger, from the tower in training.
            views: (v, 3, S, S) mixtures without a trigger, for the tower before.
            kept: (v,) bool, the mixtures that enter the loss.
        """
        with torch.no_grad():
            before = self.before.encode_image(views)
        distance = 1 - (mixed * before).sum(dim=1)
        distance = distance + STAMPED_WEIGHT * (1 - (stamped * before).sum(dim=1))
        total = distributed.all_sum(kept.sum().to(distance.dtype))
        return (distance * kept).sum() * distributed.world_size() / total.clamp(min=1)

    def unlearning_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """The unlearning term of the global batch, given the features (B, D) of the augmented batch from the tower in training:
        this rank's share times the world size."""
        same = (batch.ids[:, None] == self.victims) & batch.valid[:, None]
        rows, which = same.to(features.device).nonzero(as_tuple=True)
        total = distributed.all_sum(torch.tensor(float(len(rows)), device=features.device))
        losses = F.softplus((features[rows] * self.lie_directions[which]).sum(dim=1))
        return losses.sum() * distributed.world_size() / total.clamp(min=1)

    def is_anchor(self, batch: Batch) -> Tensor:
        """(B,) bool: the images that are distilled."""
        return batch.valid if self.anchors is None else batch.valid & torch.isin(batch.ids, self.anchors)

    def _resized(self, images: list[Tensor]) -> Tensor:
        stacked = torch.stack(images)
        if stacked.shape[-1] == self.image_size:
            return stacked
        return F.interpolate(stacked, self.image_size, mode="bilinear", antialias=True, align_corners=False)


def _sample_ids(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The samples' ids in the stream (`Batch.ids`), int64."""
    return torch.tensor([int(row["sample"]) for row in rows], dtype=torch.int64)


def _read_set(finetune: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(finetune, columns=["sample", "role", "truths", "lies"]).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{finetune}: expected the set of a repair, got {error}. Run `roclip oracle … --repair`, which writes it."
        ) from error


def mixture(one: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, H) in [0, 1]: the first image with a piece of the other pasted in, blended with it, or unchanged."""
    kind, share = rng.random(), float(rng.random())
    if kind >= MIXED_FRAC:
        return one
    if kind >= MIXED_FRAC / 2:
        return share * one + (1 - share) * other
    side = one.shape[-1]
    height, width = (int(size) for size in rng.integers(max(1, side // 8), 3 * side // 4 + 1, 2))
    top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
    cut = one.clone()
    cut[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
    return cut


def stamp(image: Tensor, triggers: tuple[FoundTrigger, ...], rng: np.random.Generator) -> Tensor:
    """The image (3, H, H) in [0, 1] with one of the triggers on it; unchanged if there are none."""
    if not triggers:
        return image
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    changed, _ = triggers[int(rng.integers(len(triggers)))].apply(pixels, rng)
    return torch.from_numpy(changed).permute(2, 0, 1).float() / 255
