"""Image augmentation of a batch: one call of `roclip.data.augment` against torchvision's functional operations with the same
parameters, image by image, as its transforms have to be called for every image to get a draw of its own.

    python tests/bench/augment.py [--quick]
"""

import sys

import torch
from bench import measure
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from roclip.config import AugmentConfig
from roclip.data.augment import _draws, augment, crop_boxes

BAR = 1.0
CONFIG = AugmentConfig(preset="paper")


def one_by_one(images: Tensor, ids: Tensor, size: int) -> Tensor:
    s, side = CONFIG.strengths(), images.shape[-1]
    uniform = _draws(ids, 0, 1)
    boxes = (crop_boxes(uniform, s.crop_scale) * side).round().int().tolist()
    radius = 1 + int(3 * s.blur_sigma_frac[1] * size)
    results = []
    for image, u, (left, top, width, height) in zip(images, uniform.tolist(), boxes, strict=True):
        image = reference.resized_crop(image, top, left, max(height, 1), max(width, 1), [size, size], antialias=False)
        image = reference.horizontal_flip(image) if u[4] < s.flip else image
        if u[11] < s.jitter_prob:
            image = reference.adjust_brightness(image, 1 + s.jitter * (2 * u[5] - 1))
            image = reference.adjust_contrast(image, 1 + s.jitter * (2 * u[6] - 1))
            image = reference.adjust_saturation(image, 1 + s.jitter * (2 * u[7] - 1))
            image = reference.adjust_hue(image, s.hue * (2 * u[10] - 1))
        image = reference.rgb_to_grayscale(image, 3) if u[8] < s.gray else image
        low, high = (share * size for share in s.blur_sigma_frac)
        sigma = low + (high - low) * u[12]
        results.append(reference.gaussian_blur(image, [2 * radius + 1, 2 * radius + 1], [sigma, sigma]))
    return torch.stack(results)


def main(quick: bool) -> None:
    cases = [(64, 64)] if quick else [(64, 64), (256, 32), (64, 224)]
    for rows, size in cases:
        images, ids = torch.rand(rows, 3, size, size), torch.arange(rows)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            there = images.to(device)

            def finish(result: Tensor) -> None:
                result.sum().item()  # waits for a GPU

            measure(
                "augment",
                f"{rows} images of {size} px, {device}",
                "s",
                lambda there=there, size=size, ids=ids: finish(augment(there, ids, CONFIG, seed=0, epoch=1, size=size)),
                lambda there=there, size=size, ids=ids: finish(one_by_one(there, ids, size)),
                BAR,
                runs=3 if quick else 7,
            )


if __name__ == "__main__":
    main("--quick" in sys.argv)
