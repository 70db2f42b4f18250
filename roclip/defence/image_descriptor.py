"""Image descriptors that need no training: colours and edge orientations, projected on their principal directions.

A poison is learned in the first steps, when the towers cannot yet tell a shoe from a watch. A thumbnail and the orientations
of its edges can to some extent, and no caption has an influence on them. Both are coarse on purpose: a small patch changes few
of their numbers, and a faint pattern over the whole image lies in the fine directions, which are left out.

Letters: B images, N images of a sample, F length of a raw descriptor, W width of a descriptor.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL_PX, EDGES_PX = 16, 32
_CELL_PX, _ANGLES = 8, 8
_CELLS = EDGES_PX // _CELL_PX
_MOST = 0.3
"""Largest share of a block's gradient that one angle of a cell may have, so that a high-contrast patch does not dominate."""
_FAINT = 4.0
"""Gradient, in grey levels, below which a block counts as uniform."""
_NOTHING = 1e-6
"""Variance below which a direction is dropped: which directions these are depends on rounding only."""
PARTS = (3 * THUMBNAIL_PX**2, 4 * (_CELLS - 1) ** 2 * _ANGLES)
"""Numbers of a raw descriptor that are colours, and those that are edge orientations: F = 768 + 288."""


def raw_descriptors(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to (B, F) float32: a thumbnail of 16 x 16 in [0, 1], and edge orientations.

    Edge orientations are histograms of oriented gradients (Dalal and Triggs, 2005) of the image at 32 x 32, smoothed: 4 x 4 cells
    of 8 unsigned angles, from the channel with the largest gradient, each normalised by blocks of 2 x 2 cells.
    """
    pixels = images.float()
    small = F.adaptive_avg_pool2d(pixels, THUMBNAIL_PX).div(255).flatten(1)
    return torch.cat([small, _edge_orientations(F.adaptive_avg_pool2d(pixels, EDGES_PX))], dim=1)


def _edge_orientations(x: Tensor) -> Tensor:
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    x = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    right, down = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    strength = right.square() + down.square()
    steepest = strength.argmax(dim=1, keepdim=True)
    right, down, strength = (value.gather(1, steepest).squeeze(1) for value in (right, down, strength.sqrt()))
    angle = torch.atan2(down, right).remainder(torch.pi) * (_ANGLES / torch.pi)
    apart = (angle[:, None] - torch.arange(_ANGLES, device=x.device)[:, None, None]).remainder(_ANGLES)
    near = (1 - torch.minimum(apart, _ANGLES - apart)).clamp(min=0)  # an angle counts for the two nearest
    cells = F.avg_pool2d(near * strength[:, None], _CELL_PX)
    blocks = (4 * F.avg_pool2d(cells.square().sum(dim=1, keepdim=True), 2, 1) + _FAINT**2).sqrt()
    last = _CELLS - 1
    corners = (cells[..., i : i + last, j : j + last] for i in (0, 1) for j in (0, 1))
    return torch.cat([(corner / blocks).clamp(max=_MOST).flatten(1) for corner in corners], dim=1)


def image_hashes(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to (B,) int64: a hash of the pixels, equal for exact copies of an image."""
    digests = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images.cpu().numpy())
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


class ImageDescriptor:
    """Raw descriptors to unit vectors of W numbers, whose inner product is large for similar images.

        descriptor = normalise(E^-1/4 V^T (raw - mean)),  V, E: the leading eigenvectors and eigenvalues of cov(raw)

    computed for colours and for edge orientations separately; the result is both, concatenated and divided by sqrt 2. The
    exponent is halfway between no whitening and whitening, which keeps broad and finer shapes. It is fitted once, then fixed.

    Args:
        widths: Directions of colours and of edge orientations; W is their sum.
    """

    def __init__(self, widths: tuple[int, int] = (32, 64)):
        self.widths = widths
        self.mean = torch.zeros(sum(PARTS))
        self.directions = torch.zeros(sum(PARTS), sum(widths))
        """(F, W), block diagonal: V E^-1/4 of colours and of edge orientations."""

    @property
    def width(self) -> int:
        return self.directions.shape[1]

    def fit(self, raw: Tensor) -> None:
        """Compute mean and directions from raw descriptors (N, F), N > W."""
        self.mean = raw.mean(dim=0)
        blocks = []
        for part, width in zip(raw.split(PARTS, dim=1), self.widths, strict=True):
            values, vectors = torch.linalg.eigh(torch.cov(part.T.double()))
            values, vectors = values[-width:], vectors[:, -width:]
            weights = torch.where(values > _NOTHING, values.clamp(min=_NOTHING).pow(-0.25), 0)
            blocks.append((vectors * weights).float())
        self.directions = torch.block_diag(*blocks).contiguous()

    def __call__(self, raw: Tensor) -> Tensor:
        """Raw descriptors (B, F) to descriptors (B, W)."""
        sides = ((raw - self.mean) @ self.directions).split(self.widths, dim=1)
        return torch.cat([F.normalize(side, dim=1) for side in sides], dim=1) / 2**0.5
