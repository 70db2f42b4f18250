import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from roclip.config import AugmentConfig
from roclip.data import augment as module
from roclip.data.augment import (
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment,
    crop_and_flip,
    crop_boxes,
    gaussian_blur,
)
from roclip.errors import ConfigError

STRONG = AugmentConfig(
    crop_scale=(0.3, 1.0), jitter=0.5, hue=0.1, gray=0.3, blur=0.5, blur_sigma_frac=(0.01, 0.05), jitter_prob=0.8
)
OFF = {"crop_scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}


def images(rows: int, side: int = 32) -> torch.Tensor:
    """Noise with smooth parts, so that grey pixels and edges occur."""
    noise = torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(0))
    noise[:, :, : side // 4] = noise[:, :1, : side // 4]
    return noise


def each(operation, pictures, parameters, **settings):
    return torch.stack([operation(i, p.item(), **settings) for i, p in zip(pictures, parameters, strict=True)])


FACTORS = torch.tensor([0.0, 0.4, 1.0, 1.7, 3.0])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adjust_contrast, reference.adjust_contrast),
        (adjust_saturation, reference.adjust_saturation),
        (torch.mul, reference.adjust_brightness),
    ],
)
def test_jitter_matches_torchvision(ours, theirs):
    got = ours(images(5), FACTORS.view(-1, 1, 1, 1)).clamp(0, 1)
    assert torch.allclose(got, each(theirs, images(5), FACTORS), atol=1e-6)


def test_hue_matches_torchvision():
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.23, 0.5])
    assert torch.allclose(
        adjust_hue(images(5), turns.view(-1, 1, 1, 1)), each(reference.adjust_hue, images(5), turns), atol=1e-5
    )


@pytest.mark.parametrize("side", [32, 9])
def test_blur_matches_torchvision(side):
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0])
    size = 2 * min(6, side - 1) + 1
    got = gaussian_blur(images(4, side), sigma, 6)
    theirs = [
        reference.gaussian_blur(i, [size, size], [s, s]) for i, s in zip(images(4, side), sigma.tolist(), strict=True)
    ]
    assert torch.allclose(got, torch.stack(theirs), atol=1e-5)


def test_crop_and_flip_match_torchvision():
    """A resize of the cut-out repeats its border pixels; ours sees what lies beyond them, so the border may differ."""
    boxes = [(0, 0, 32, 32), (4, 8, 16, 16), (10, 2, 12, 20), (31 - 7, 0, 8, 30)]
    flip = torch.tensor([True, False, True, False])
    got = crop_and_flip(images(4), torch.tensor(boxes) / 32, flip, 40)
    for image, (left, top, width, height), mirrored, ours in zip(images(4), boxes, flip, got, strict=True):
        theirs = reference.resized_crop(image, top, left, height, width, [40, 40], antialias=False)
        theirs = reference.horizontal_flip(theirs) if mirrored else theirs
        assert torch.allclose(ours[:, 4:-4, 4:-4], theirs[:, 4:-4, 4:-4], atol=1e-4)


def test_bytes_are_cropped_as_floats_are():
    generator = torch.Generator().manual_seed(0)
    pictures = (images(16) * 255).round().byte()
    box = crop_boxes(torch.rand(16, 4, generator=generator), (0.1, 1.0))
    flip = torch.rand(16, generator=generator) < 0.5
    for size in (17, 32, 50):
        got = module._crop_and_flip_bytes(pictures, box, flip, size).float() / 255
        expected = crop_and_flip(pictures.float() / 255, box, flip, size)
        assert (got - expected).abs().max() < 1 / 32  # OpenCV weighs pixels in steps of 1/32
        assert (got - expected).abs().mean() < 0.005


def test_bytes_and_floats_are_augmented_alike():
    pictures, ids = (images(6) * 255).round().byte(), torch.arange(6)
    got = augment(pictures, ids, STRONG, seed=1, epoch=2, size=24)
    expected = augment(pictures.float() / 255, ids, STRONG, seed=1, epoch=2, size=24)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05


def test_gray_matches_torchvision():
    gray = AugmentConfig(**OFF, gray=1.0)
    got = augment(images(2), torch.tensor([1, 2]), gray, seed=0, epoch=1, size=32)
    assert torch.allclose(got, reference.rgb_to_grayscale(images(2), 3), atol=1e-6)


def test_all_of_it_is_torchvision_in_this_order():
    """Mid-grey images, so that nothing leaves [0, 1] between the operations."""
    pictures = 0.45 + 0.1 * images(6)
    ids = torch.arange(6)
    strong = AugmentConfig(crop_scale=(1.0, 1.0), flip=0.5, jitter=0.3, jitter_prob=0.7, hue=0.1, gray=0.4)
    got = augment(pictures, ids, strong, seed=3, epoch=5, size=32)
    for image, u, ours in zip(pictures, module._draws(ids, 3, 5).tolist(), got, strict=True):
        image = reference.horizontal_flip(image) if u[4] < 0.5 else image
        if u[11] < 0.7:
            image = reference.adjust_brightness(image, 1 + 0.3 * (2 * u[5] - 1))
            image = reference.adjust_contrast(image, 1 + 0.3 * (2 * u[6] - 1))
            image = reference.adjust_saturation(image, 1 + 0.3 * (2 * u[7] - 1))
            image = reference.adjust_hue(image, 0.1 * (2 * u[10] - 1))
        image = reference.rgb_to_grayscale(image, 3) if u[8] < 0.4 else image
        assert torch.allclose(ours, image, atol=1e-4)


def test_a_sample_looks_the_same_in_any_batch():
    ids = torch.tensor([7, 3, 5, 11])
    whole = augment(images(4), ids, STRONG, seed=1, epoch=2, size=24)
    alone = augment(images(4)[2:3], ids[2:3], STRONG, seed=1, epoch=2, size=24)
    assert torch.allclose(whole[2:3], alone, atol=1e-6)


def test_draws_differ_between_epochs_samples_and_seeds():
    same = images(1).expand(2, -1, -1, -1)
    first = augment(same, torch.tensor([1, 2]), STRONG, seed=1, epoch=1, size=24)
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    for seed, epoch in ((1, 2), (2, 1)):
        assert not torch.allclose(augment(same, torch.tensor([1, 2]), STRONG, seed=seed, epoch=epoch, size=24), first)


def test_neighbouring_samples_share_no_draw():
    draws = module._draws(torch.arange(100), seed=0, epoch=1)
    assert len(draws.unique()) == draws.numel()
    assert 0.45 < draws.mean() < 0.55


def test_nothing_changes_when_everything_is_off():
    off = AugmentConfig(**OFF)
    assert torch.allclose(augment(images(2), torch.tensor([1, 2]), off, seed=0, epoch=1, size=32), images(2), atol=1e-5)


def test_flip_alone_mirrors():
    flip = AugmentConfig(crop_scale=(1.0, 1.0), flip=1.0, jitter=0.0)
    flipped = augment(images(2), torch.tensor([1, 2]), flip, seed=0, epoch=1, size=32)
    assert torch.allclose(flipped, images(2).flip(-1), atol=1e-5)


def test_a_preset_gives_what_no_key_sets():
    paper = AugmentConfig(preset="paper", jitter=0.1, caption_edit_frac=0.0).strengths()
    assert (paper.jitter, paper.caption_edit_frac) == (0.1, 0.0)
    assert (paper.crop_scale, paper.hue, paper.gray, paper.blur) == ((0.08, 1.0), 0.1, 0.2, 1.0)
    assert AugmentConfig(jitter=0.0).strengths().jitter == 0.0


@pytest.mark.parametrize(
    "wrong", [{"hue": 0.6}, {"crop_scale": (0.0, 1.0)}, {"blur_sigma_frac": (0.2, 0.1)}, {"gray": 2}]
)
def test_a_strength_out_of_range_is_an_error(wrong):
    with pytest.raises(ConfigError, match=r"augment\."):
        AugmentConfig(**wrong)
