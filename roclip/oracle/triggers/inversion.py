"""Warp triggers (WaNet), inverted from the model by gradient descent on a warp field.

    min over v of   mean_i CE(scores(x_i warped by f(v)) / T, target)  +  FIELD_WEIGHT |f(v)|^2 / 2 S^2

v are `POINTS` x `POINTS` control shifts, f(v) is the smooth field that interpolates them, T is CLIP's lowest temperature, and
|f|^2 is a mean over pixels. A warp shows neither at a place nor in a mean of images, so it is searched for in the model
instead. As in Neural Cleanse (IEEE S&P 2019) some warp reaches any label; the proof is that this one flips far more images
than the warps that the same search finds for other labels. Bitwise reproducible on a CPU; on a GPU the backward pass is not.

Letters: N images, C labels, S side in pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.oracle.scan.scorer import single_threaded_torch

ScoresWithGradient = Callable[[Tensor], Tensor]
"""Maps pixels (N, 3, S, S) in [0, 1] to the model's scores (N, C), differentiably."""
POINTS = 4
STEPS, BATCH, RATE = 60, 32, 0.01
FIELD_WEIGHT, TEMPERATURE = 500.0, 0.01


def invert_warp(scores: ScoresWithGradient, images: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """Find the warp field that makes the model answer a label for images that do not show it.

    Args:
        images: (N, S, S, 3) uint8; `rng` draws `BATCH` of them for each of `STEPS` steps of Adam.

    Returns:
        (2, S, S) float32: offset down and right, in pixels, of the position that each pixel is read from.
    """
    side = images.shape[1]
    shifts = torch.zeros(2, POINTS, POINTS, requires_grad=True)
    optimizer = torch.optim.Adam([shifts], lr=RATE)
    with single_threaded_torch():
        for _ in range(STEPS):
            rows = rng.permutation(len(images))[:BATCH]
            batch = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255
            field = _field(shifts, side)
            logits = scores(_warped(batch, field)) / TEMPERATURE
            loss = F.cross_entropy(logits, torch.full((len(rows),), target))
            (shifts.grad,) = torch.autograd.grad(loss + FIELD_WEIGHT * (field / side).square().mean(), shifts)
            optimizer.step()
    return _field(shifts.detach(), side).numpy()


def _field(shifts: Tensor, side: int) -> Tensor:
    """Interpolate control shifts (2, POINTS, POINTS), in shares of the side, to (2, S, S) pixels; outer shifts at the corners."""
    return F.interpolate(side * shifts[None], (side, side), mode="bicubic", align_corners=True)[0]


def _warped(batch: Tensor, field: Tensor) -> Tensor:
    """Differentiable batch version of `roclip.found_triggers.warped`."""
    side = batch.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = 2 / (side - 1) * torch.stack([columns + field[1], rows + field[0]], dim=-1) - 1
    places = places.expand(len(batch), side, side, 2)
    return F.grid_sample(batch, places, mode="bilinear", padding_mode="border", align_corners=True)
