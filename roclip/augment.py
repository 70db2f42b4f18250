"""Image augmentation for whole batches, drawn for each (seed, epoch, sample).

The draw depends on nothing else, so a sample looks the same on any rank of any number of ranks, and after a resume.
Letters: B local batch.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.config import AugmentConfig

_LUMA = (0.299, 0.587, 0.114)


def augment(images: Tensor, ids: Tensor, config: AugmentConfig, *, seed: int, epoch: int, size: int) -> Tensor:
    """Random crop, flip, brightness, contrast, saturation, grey and blur.

    Args:
        images: (B, 3, H, W) in [0, 1].
        ids: (B,) int64 sample ids.
        size: Side of the result, in pixels.

    Returns:
        (B, 3, size, size) in [0, 1].

    The operations and their order are SimCLR's (arXiv:2002.05709), which RoCLIP uses; strengths are in the config.
    """
    draws = np.stack([np.random.Philox(key=[seed, epoch], counter=[int(i), 0, 0, 0]).random_raw(10) for i in ids])
    uniform = torch.from_numpy((draws >> np.uint64(11)).astype(np.float64) * 2.0**-53).float().to(images.device)
    if config.crop_scale != (1.0, 1.0) or config.flip or images.shape[-2:] != (size, size):
        images = _crop_and_flip(images, uniform[:, :5], config, size)
    images = _jitter(images, uniform[:, 5:8], config)
    if config.gray:
        gray = _luma(images).expand_as(images)
        images = torch.where((uniform[:, 8] < config.gray).view(-1, 1, 1, 1), gray, images)
    if config.blur and (rows := uniform[:, 9] < config.blur).any():
        images = images.clone()
        images[rows] = gaussian_blur(images[rows], size / 32)
    return images


def gaussian_blur(images: Tensor, sigma_px: float) -> Tensor:
    """Separable Gaussian blur of (B, C, H, W) with reflected borders."""
    radius = min(math.ceil(3 * sigma_px), min(images.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _crop_and_flip(images: Tensor, uniform: Tensor, config: AugmentConfig, size: int) -> Tensor:
    low, high = config.crop_scale
    area = low + (high - low) * uniform[:, 0]
    ratio = torch.exp((2 * uniform[:, 1] - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    if low == high == 1:
        width = height = torch.ones_like(area)
    flip = torch.where(uniform[:, 4] < config.flip, -1.0, 1.0)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = flip * width, (2 * uniform[:, 2] - 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, (2 * uniform[:, 3] - 1) * (1 - height)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _jitter(images: Tensor, uniform: Tensor, config: AugmentConfig) -> Tensor:
    if not config.jitter:
        return images
    brightness, contrast, saturation = (1 + config.jitter * (2 * uniform - 1)).T.reshape(3, -1, 1, 1, 1)
    images = images * brightness
    mean = _luma(images).mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    gray = _luma(images)
    return (gray + (images - gray) * saturation).clamp(0, 1)


def _luma(images: Tensor) -> Tensor:
    return (images * torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
