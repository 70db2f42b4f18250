"""Image augmentation for whole batches, with parameters drawn for each (seed, epoch, sample).

The parameters depend on nothing else, so a sample is augmented the same on any rank, with any number of ranks, and after a
resume. torchvision's transforms draw one set of parameters a call and would need a call for each image; here each image of a
batch has its own parameters in one call. The tests compare each operation with torchvision's.

Letters: B local batch.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from roclip.config import AugmentConfig, Strengths

_DRAWS = 13


def augment(images: Tensor, ids: Tensor, config: AugmentConfig, *, seed: int, epoch: int, size: int) -> Tensor:
    """Random crop, flip, brightness, contrast, saturation, hue, grey and blur.

    Args:
        images: (B, 3, H, W) uint8, or float in [0, 1].
        ids: (B,) int64 sample ids.
        size: Side of the result, in pixels.

    Returns:
        (B, 3, size, size) in [0, 1].

    Source: operations and their order are SimCLR's (arXiv:2002.05709), as in RoCLIP; the strengths come from the config.
    """
    strengths = config.strengths()
    uniform = _draws(ids, seed, epoch).to(images.device)
    if strengths.crop_scale != (1.0, 1.0) or strengths.flip or images.shape[-2:] != (size, size):
        box = crop_boxes(uniform[:, :4], strengths.crop_scale)
        crop = _crop_and_flip_bytes if images.dtype == torch.uint8 and images.device.type == "cpu" else crop_and_flip
        images = crop(as_float(images) if crop is crop_and_flip else images, box, uniform[:, 4] < strengths.flip, size)
    images = as_float(images)
    if strengths.jitter or strengths.hue:
        images = _jitter(images, uniform, strengths)
    if strengths.gray:
        chosen = (uniform[:, 8] < strengths.gray).view(-1, 1, 1, 1)
        images = torch.where(chosen, rgb_to_grayscale(images, 3), images)
    if strengths.blur and (rows := uniform[:, 9] < strengths.blur).any():
        low, high = (share * size for share in strengths.blur_sigma_frac)
        sigma_px = low + (high - low) * uniform[rows, 12]
        images = images.clone()
        images[rows] = gaussian_blur(images[rows], sigma_px, math.ceil(3 * high))
    return images


def crop_boxes(uniform: Tensor, scale: tuple[float, float]) -> Tensor:
    """Left, top, width and height (B, 4) of random crops, as fractions of the image.

    The area is uniform in `scale`, the log aspect ratio uniform in ±log 4/3; crops are clipped to the image.

    Args:
        uniform: (B, 4) random numbers in [0, 1).
    """
    low, high = scale
    area = low + (high - low) * uniform[:, 0]
    ratio = torch.exp((2 * uniform[:, 1] - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    if low == high == 1:
        width = height = torch.ones_like(area)
    return torch.stack([uniform[:, 2] * (1 - width), uniform[:, 3] * (1 - height), width, height], dim=1)


def crop_and_flip(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crops `box` (B, 4), resized bilinearly to (B, 3, size, size) and mirrored where `flip` (B,) is true."""
    left, top, width, height = box.T
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = torch.where(flip, -width, width), 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def as_float(images: Tensor) -> Tensor:
    """uint8 images to float in [0, 1]; float images are returned as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _crop_and_flip_bytes(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """`crop_and_flip` for uint8 on a CPU, by OpenCV, in a third of the time. OpenCV quantises interpolation weights to 1/32,
    which bounds the error."""
    rows, _, height_px, width_px = images.shape
    cropped = np.empty((rows, size, size, 3), dtype=np.uint8)
    shares = zip(images.permute(0, 2, 3, 1).numpy(), box.tolist(), flip.tolist(), cropped, strict=True)
    for image, (left, top, width, height), mirrored, out in shares:
        # pixel centres: x_in + 1/2 = W (left + width (x_out + 1/2) / size)
        dx, dy = width * width_px / size, height * height_px / size
        x = left * width_px + dx / 2 - 0.5 if not mirrored else (left + width) * width_px - dx / 2 - 0.5
        to_input = np.array([[-dx if mirrored else dx, 0, x], [0, dy, top * height_px + dy / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(image, to_input, (size, size), dst=out, flags=flags, borderMode=cv2.BORDER_REFLECT)
    return torch.from_numpy(cropped).permute(0, 3, 1, 2)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """mean + (image - mean) · factor, with the mean of the grey image; factor (B, 1, 1, 1)."""
    mean = rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * factor


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """grey + (image - grey) · factor; factor (B, 1, 1, 1)."""
    gray = rgb_to_grayscale(images)
    return gray + (images - gray) * factor


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Images in [0, 1] with the hue of HSV rotated by `turns` (B, 1, 1, 1), in full turns."""
    red, green, blue = images.unbind(dim=1)
    value, place = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1)
    sixths = torch.stack([(green - blue) / divisor, (blue - red) / divisor + 2, (red - green) / divisor + 4], dim=1)
    hue = sixths.gather(1, place[:, None]) + 6 * turns
    channels = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    k = (channels + hue).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma_px: Tensor, radius: int) -> Tensor:
    """Separable Gaussian blur of (B, C, H, W) with reflected borders; sigma (B,), kernel of 2 · radius + 1 pixels."""
    rows, channels, height, width = images.shape
    radius = min(radius, height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.softmax(-0.5 * (offsets / sigma_px[:, None]) ** 2, dim=1)
    kernels = kernels.repeat_interleave(channels, dim=0)[:, None, None]
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    blurred = F.conv2d(F.conv2d(padded, kernels, groups=rows * channels), kernels.mT, groups=rows * channels)
    return blurred.view(images.shape)


def _jitter(images: Tensor, uniform: Tensor, strengths: Strengths) -> Tensor:
    """Brightness, contrast, saturation and hue. Values are clamped to [0, 1] once, before the hue, which needs it."""
    chosen = uniform[:, 11] < strengths.jitter_prob
    factors = torch.where(chosen[:, None], 1 + strengths.jitter * (2 * uniform[:, 5:8] - 1), 1)
    brightness, contrast, saturation = factors.T.reshape(3, -1, 1, 1, 1)
    images = adjust_saturation(adjust_contrast(images * brightness, contrast), saturation).clamp(0, 1)
    if strengths.hue:
        turns = torch.where(chosen, strengths.hue * (2 * uniform[:, 10] - 1), 0)
        images = adjust_hue(images, turns.view(-1, 1, 1, 1))
    return images


def _draws(ids: Tensor, seed: int, epoch: int) -> Tensor:
    """(B, `_DRAWS`) uniform in [0, 1). The id is in the upper half of the counter, so that draws of different samples never
    overlap."""
    raw = [np.random.Philox(key=[seed, epoch], counter=[0, 0, int(i), 0]).random_raw(_DRAWS) for i in ids]
    return torch.from_numpy((np.stack(raw) >> np.uint64(11)).astype(np.float64) * 2.0**-53).float()
