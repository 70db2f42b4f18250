import torch

from roclip.augment import augment, gaussian_blur
from roclip.config import AugmentConfig

STRONG = AugmentConfig(crop_scale=(0.3, 1.0), jitter=0.5, gray=0.3, blur=0.5)


def images(rows: int) -> torch.Tensor:
    return torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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


def test_nothing_changes_when_everything_is_off():
    off = AugmentConfig(crop_scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    assert torch.allclose(augment(images(2), torch.tensor([1, 2]), off, seed=0, epoch=1, size=32), images(2), atol=1e-5)


def test_flip_alone_mirrors():
    flip = AugmentConfig(crop_scale=(1.0, 1.0), flip=1.0, jitter=0.0)
    flipped = augment(images(2), torch.tensor([1, 2]), flip, seed=0, epoch=1, size=32)
    assert torch.allclose(flipped, images(2).flip(-1), atol=1e-5)


def test_blur_keeps_the_mean_and_lowers_the_variance():
    blurred = gaussian_blur(images(2), 2.0)
    assert torch.allclose(blurred.mean(), images(2).mean(), atol=0.02)
    assert blurred.var() < 0.2 * images(2).var()
