"""A fine-tuning that changes two things: the tower shall not see a trigger, and shall take back the lies that it knows by heart.
For all else it stays what it was.

    hold     1/N sum_i [ (1 - x(m_i) . x0(m_i)) + STAMPED_WEIGHT (1 - x(s_i) . x0(m_i)) ]
    refute   1/V sum_v log(1 + exp(s (x_v . t(lie_v) - x_v . t(truth_v))))

x0 is the tower before, m_i a mixture of two pictures of the batch, and s_i the same mixture with a found trigger on it. A
compact set has few pictures, which the model knows by heart; their mixtures are without number, and what the tower made of
them before is known. So the tower is held where it was all over, and not only where the set is.

Of a repair's set only the anchors are held on to, of which model, oracle and caption agree: what the model says of a victim
shall go. Its new caption alone does not always drive that out, as a batch may have no caption that says the lie. So a victim v
is held against the zero-shot weights t of truth and lie too, at the scale s of the model before.

Letters: B local batch, D feature width, V repaired victims and N kept mixtures of the global batch, `VIEWS` mixtures for each
picture; H side of the stored pictures in pixels.
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
"""Share of the views that are mixtures: half of them cut and pasted (arXiv:1905.04899), half blended (arXiv:1710.09412)."""
_VIEW = AugmentConfig(crop_scale=(0.7, 1.0), flip=0.5, jitter=0.3)
_SEED = 2 << 32


class Distillation:
    """Makes the views of a batch, and both terms of the loss."""

    def __init__(self, before: Towers, triggers: str, finetune: str, seed: int, image_size: int):
        """
        Args:
            triggers: A folder that `save_triggers` wrote; empty only holds.
            finetune: The set's parquet (sample, role, truths, lies); empty holds on to every picture, and refutes nothing.
            image_size: Side of the tower's input, in pixels.

        Raises `DataError` for a set that cannot be read.
        """
        self.before, self.seed, self.image_size = before, seed, image_size
        self.triggers = load_triggers(Path(triggers)) if triggers else ()
        rows = _read_set(Path(finetune)) if finetune else []
        self.anchors = _numbers([row for row in rows if row["role"] == "anchor"]) if finetune else None
        victims = [row for row in rows if row["lies"]]
        self.victims = _numbers(victims)
        encoder, device = Encoder(before), next(before.parameters()).device
        weights = {tuple(row[column]): torch.empty(0) for row in victims for column in ("truths", "lies")}
        for prompts in weights:
            weights[prompts] = F.normalize(encoder.texts(prompts).mean(dim=0), dim=0)
        astray = [weights[tuple(row["lies"])] - weights[tuple(row["truths"])] for row in victims]
        apart = torch.stack(astray).to(device) if astray else torch.empty(0, 1, device=device)
        self.astray = before.logit_scale.detach().float().exp() * apart

    def views(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mixtures of the pictures that are held on to and the same with a trigger on them, (v, 3, S, S) in [0, 1] each, v =
        `VIEWS` B and S the tower's side; and (v,) bool, whether they count. Without a trigger the second is the first.

        Each such picture begins as many of them as any other, give or take one. Where none is held on to, the views are of
        all and do not count.
        """
        held = self.held(batch)
        rows = (held if held.any() else torch.ones_like(held)).nonzero().flatten()
        wanted, side = VIEWS * len(batch.images), batch.images.shape[-1]
        images, ids = batch.images[rows], batch.ids[rows]
        mixed, stamped = [], []
        for turn in range(1, -(-wanted // len(rows)) + 1):
            seed = self.seed + turn * _SEED
            pixels = augment(images, ids, _VIEW, seed=seed, epoch=epoch, size=side).cpu()
            for n in range(min(len(rows), wanted - len(mixed))):
                rng = np.random.default_rng((seed, epoch, int(ids[n])))
                mixed.append(mixture(pixels[n], pixels[(n + turn) % len(rows)], rng))
                stamped.append(stamp(mixed[-1], self.triggers, rng))
        return self._sized(mixed), self._sized(stamped), held.any().expand(wanted)

    def loss(self, mixed: Tensor, stamped: Tensor, views: Tensor, kept: Tensor) -> Tensor:
        """The module's first formula. Of the global batch: the value is this rank's share times the world size.

        Args:
            mixed, stamped: (v, D) features of the tower that learns.
            views: The mixtures, which the tower before is asked about.
            kept: (v,) bool.
        """
        with torch.no_grad():
            before = self.before.encode_image(views)
        distance = 1 - (mixed * before).sum(dim=1)
        distance = distance + STAMPED_WEIGHT * (1 - (stamped * before).sum(dim=1))
        total = distributed.all_sum(kept.sum().to(distance.dtype))
        return (distance * kept).sum() * distributed.world_size() / total.clamp(min=1)

    def refute(self, features: Tensor, batch: Batch) -> Tensor:
        """The module's second formula, of the batch's features (B, D) of the tower that learns, which come as they are augmented;
        as `loss`, this rank's share times the world size."""
        same = (batch.ids[:, None] == self.victims) & batch.valid[:, None]
        rows, which = same.to(features.device).nonzero(as_tuple=True)
        total = distributed.all_sum(torch.tensor(float(len(rows)), device=features.device))
        wrong = F.softplus((features[rows] * self.astray[which]).sum(dim=1))
        return wrong.sum() * distributed.world_size() / total.clamp(min=1)

    def held(self, batch: Batch) -> Tensor:
        """(B,) bool: the pictures that are held on to."""
        return batch.valid if self.anchors is None else batch.valid & torch.isin(batch.ids, self.anchors)

    def _sized(self, pictures: list[Tensor]) -> Tensor:
        stacked = torch.stack(pictures)
        if stacked.shape[-1] == self.image_size:
            return stacked
        return F.interpolate(stacked, self.image_size, mode="bilinear", antialias=True, align_corners=False)


def _numbers(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Those under which training knows the samples."""
    return torch.tensor([int(row["sample"]) for row in rows], dtype=torch.int64)


def _read_set(finetune: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(finetune, columns=["sample", "role", "truths", "lies"]).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{finetune}: expected the set of a repair, got {error}. Run `roclip oracle … --repair`, which writes it."
        ) from error


def mixture(one: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, H) in [0, 1]: the picture with a piece of the other, or blended with it, or as it is."""
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


def stamp(picture: Tensor, triggers: tuple[FoundTrigger, ...], rng: np.random.Generator) -> Tensor:
    """(3, H, H) in [0, 1] with one of the triggers on it."""
    if not triggers:
        return picture
    image = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    changed, _ = triggers[int(rng.integers(len(triggers)))].apply(image, rng)
    return torch.from_numpy(changed).permute(2, 0, 1).float() / 255
