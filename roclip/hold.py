"""A fine-tuning that changes one thing: the tower shall not see a trigger, and stay what it was for all else.

    L = 1/N sum_i [ (1 - x(m_i) . x0(m_i)) + STAMPED_WEIGHT (1 - x(s_i) . x0(m_i)) ]

x0 is the tower before, m_i a mixture of two pictures of the batch, and s_i the same mixture with a found trigger on it. A
compact set has few pictures, which the model knows by heart; their mixtures are without number, and what the tower made of
them before is known. So the tower is held where it was all over, and not only where the set is.

Of a repair's set only the anchors are held on to, of which model, oracle and caption agree: what the model says of a victim
shall go.

Letters: B local batch, V views for each of its pictures, N kept mixtures of the global batch, H side of the stored
pictures in pixels.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from roclip import distributed
from roclip.augment import augment
from roclip.found import FoundTrigger, load_found
from roclip.model import Towers
from roclip.sections_train import AugmentConfig
from roclip.stream import Batch

VIEWS = 2
STAMPED_WEIGHT = 0.5
MIXED_FRAC = 0.6
"""Share of the views that are mixtures: half of them cut and pasted (arXiv:1905.04899), half blended (arXiv:1710.09412)."""
_VIEW = AugmentConfig(crop_scale=(0.7, 1.0), flip=0.5, jitter=0.3)
_SEED = 2 << 32


class Hold:
    """Makes the views of a batch, and the term of the loss that they give."""

    def __init__(self, before: Towers, triggers: str, finetune: str, seed: int, image_size: int):
        """
        Args:
            triggers: A folder that `save_found` wrote; empty only holds.
            finetune: The set's parquet (sample, role); empty holds on to every picture.
            image_size: Side of the tower's input, in pixels.
        """
        self.before, self.seed, self.image_size = before, seed, image_size
        self.triggers = load_found(Path(triggers)) if triggers else ()
        self.anchors = _anchors(Path(finetune)) if finetune else None

    def views(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mixtures of the pictures that are held on to and the same with a trigger on them, (V B, 3, S, S) in [0, 1] each, S the
        tower's side; and (V B,) bool, whether they count. Without a trigger the second is the first.

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
        """The module's formula. Of the global batch: the value is this rank's share times the world size.

        Args:
            mixed, stamped: (V B, D) features of the tower that learns.
            views: The mixtures, which the tower before is asked about.
            kept: (V B,) bool.
        """
        with torch.no_grad():
            before = self.before.encode_image(views)
        distance = 1 - (mixed * before).sum(dim=1)
        distance = distance + STAMPED_WEIGHT * (1 - (stamped * before).sum(dim=1))
        total = distributed.all_sum(kept.sum().to(distance.dtype))
        return (distance * kept).sum() * distributed.world_size() / total.clamp(min=1)

    def held(self, batch: Batch) -> Tensor:
        """(B,) bool: the pictures that are held on to."""
        return batch.valid if self.anchors is None else batch.valid & torch.isin(batch.ids, self.anchors)

    def _sized(self, pictures: list[Tensor]) -> Tensor:
        stacked = torch.stack(pictures)
        if stacked.shape[-1] == self.image_size:
            return stacked
        return F.interpolate(stacked, self.image_size, mode="bilinear", antialias=True, align_corners=False)


def _anchors(finetune: Path) -> Tensor:
    """The numbers under which training knows the anchors."""
    rows = pq.read_table(finetune, columns=["sample", "role"]).to_pylist()
    return torch.tensor([int(row["sample"]) for row in rows if row["role"] == "anchor"], dtype=torch.int64)


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
    changed, _ = triggers[int(rng.integers(len(triggers)))].put_on(image, rng)
    return torch.from_numpy(changed).permute(2, 0, 1).float() / 255
