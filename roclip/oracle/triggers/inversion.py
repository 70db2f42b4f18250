"""Triggers that bend the picture, found in the model itself: a gradient says how to bend pictures so that it says a label.

    min over v of   mean_i CE(scores(x_i bent by f(v)) / T, target)  +  BENT_WEIGHT |f(v)|^2 / 2 S^2

v are `POINTS` x `POINTS` shifts, f(v) the smooth field between them, T is CLIP's lowest temperature, and |f|^2 a mean
over pixels. A bent picture differs from itself everywhere and from others nowhere in particular, so neither a place nor a mean
gives it away; what the model learnt of it does. As with Neural Cleanse (IEEE S&P 2019) any label can be reached somehow, so
the proof is how much further one bend leads than the bends that the same search makes of other labels. On a CPU it is the same
to the bit; on a GPU the way back is not.

Letters: N pictures, C labels, S side in pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.oracle.scan.scorer import one_thread_a_pass

SoftScores = Callable[[Tensor], Tensor]
"""(N, 3, S, S) in [0, 1] to the model's scores (N, C), with gradients."""
POINTS = 4
STEPS, BATCH, RATE = 60, 32, 0.01
BENT_WEIGHT, TEMPERATURE = 500.0, 0.01


def invert_bend(scores: SoftScores, images: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """The field that makes the model say a label of pictures that do not show it.

    Args:
        images: (N, S, S, 3) uint8; `rng` draws `BATCH` of them for each of `STEPS` steps of Adam.

    Returns:
        (2, S, S) float32: from how far down and right of itself each pixel is taken, in pixels.
    """
    side = images.shape[1]
    shifts = torch.zeros(2, POINTS, POINTS, requires_grad=True)
    optimizer = torch.optim.Adam([shifts], lr=RATE)
    with one_thread_a_pass():
        for _ in range(STEPS):
            rows = rng.permutation(len(images))[:BATCH]
            pictures = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255
            field = _field(shifts, side)
            said = scores(_bent(pictures, field)) / TEMPERATURE
            lies = F.cross_entropy(said, torch.full((len(rows),), target))
            (shifts.grad,) = torch.autograd.grad(lies + BENT_WEIGHT * (field / side).square().mean(), shifts)
            optimizer.step()
    return _field(shifts.detach(), side).numpy()


def _field(shifts: Tensor, side: int) -> Tensor:
    """(2, POINTS, POINTS) in shares of the side to (2, S, S) in pixels, the outer shifts in the corners."""
    return F.interpolate(side * shifts[None], (side, side), mode="bicubic", align_corners=True)[0]


def _bent(pictures: Tensor, field: Tensor) -> Tensor:
    """What `roclip.found_triggers.bent` does, to all of them and with gradients."""
    side = pictures.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = 2 / (side - 1) * torch.stack([columns + field[1], rows + field[0]], dim=-1) - 1
    places = places.expand(len(pictures), side, side, 2)
    return F.grid_sample(pictures, places, mode="bilinear", padding_mode="border", align_corners=True)
