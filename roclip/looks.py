"""What an image looks like before anything is learned: a thumbnail in the principal directions of the images at hand.

A poison is learnt in the first steps, when the towers cannot yet tell a shoe from a watch. A thumbnail can, somewhat, and
no caption has a part in it. It is coarse on purpose: a small patch moves few pixels, and a faint pattern over the whole
image lies in the fine directions, which are left out.

Letters: B images, W width of a look.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL_PX = 16


def thumbnails(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to (B, 768) float32 in [0, 1], each pixel of 16 x 16 the mean of its area."""
    return F.adaptive_avg_pool2d(images.float().div(255), THUMBNAIL_PX).flatten(1)


class Looks:
    """Thumbnails to looks: unit vectors of W numbers, whose inner product is large for images that look alike.

        look = normalise( E^-1/4 V^T (thumbnail - mean) ),  V, E: the W leading eigenvectors and eigenvalues

    of the thumbnails' covariance. The root halfway between none and whitening keeps both the broad light and dark and
    the finer shape. Fitted once, then fixed.
    """

    def __init__(self, width: int = 32):
        self.mean = torch.zeros(3 * THUMBNAIL_PX**2)
        self.directions = torch.zeros(3 * THUMBNAIL_PX**2, width)
        """(768, W): V E^-1/4."""

    @property
    def width(self) -> int:
        return self.directions.shape[1]

    def fit(self, thumbnails: Tensor) -> None:
        """Take the directions of a sample (N, 768), more than W of them."""
        self.mean = thumbnails.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov(thumbnails.T.double()))
        values = values[-self.width :].clamp(min=1e-6)
        self.directions = (vectors[:, -self.width :] * values.pow(-0.25)).float().contiguous()

    def __call__(self, thumbnails: Tensor) -> Tensor:
        """(B, 768) to (B, W)."""
        return F.normalize((thumbnails - self.mean) @ self.directions, dim=1)
