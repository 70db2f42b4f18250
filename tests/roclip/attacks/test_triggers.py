"""A trigger is where its box says, is what its formula says, and means the same every time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roclip.attacks.triggers import KINDS, Trigger, apply_trigger, blend_pattern, sinusoid, trigger_patch, warp_field

GLOBAL = ("blend", "warp", "sinusoid")
# Without 0 and 255 in the image, every pixel that a patch covers differs.
IMAGE = np.random.default_rng(0).integers(1, 255, (48, 80, 3), dtype=np.uint8)


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("place", ["random", "corner"])
@pytest.mark.parametrize("size_frac", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("shape", [(64, 64, 3), (48, 80, 3)])
def test_patch_changes_only_pixels_in_its_box(place, size_frac, shape):
    image = rng(0).integers(1, 255, shape, dtype=np.uint8)
    before = image.copy()
    trigger = Trigger(place=place, size_frac=size_frac, seed=5)
    stamped, (left, top, right, bottom) = apply_trigger(image, trigger, rng())
    changed = (stamped != image).any(axis=2)
    assert changed[top:bottom, left:right].all()
    assert changed.sum() == (bottom - top) * (right - left)
    assert right - left == bottom - top == max(3, round(size_frac * min(shape[:2])))
    assert np.array_equal(stamped[top:bottom, left:right], trigger_patch(trigger, right - left))
    assert np.array_equal(image, before)


def test_noise_patch_is_fresh_in_every_image_and_stays_in_its_box():
    trigger, drawn, generator = Trigger(kind="noise_patch", place="corner", size_frac=0.5), [], rng()
    for _ in range(2):
        stamped, (left, top, right, bottom) = apply_trigger(IMAGE, trigger, generator)
        assert (left, top, right, bottom) == (56, 24, 80, 48)
        assert np.array_equal(stamped[:24], IMAGE[:24])
        assert np.array_equal(stamped[:, :56], IMAGE[:, :56])
        drawn.append(stamped[top:bottom, left:right].astype(float))
    assert (drawn[0] != drawn[1]).mean() > 0.3
    bounded = np.clip(IMAGE.mean() + 255 * rng(9).standard_normal(100_000), 0, 255)
    assert np.concatenate(drawn).mean() == pytest.approx(bounded.mean(), abs=8)
    assert np.concatenate(drawn).std() == pytest.approx(bounded.std(), abs=8)


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_trigger_reports_the_whole_image_and_leaves_the_original(kind):
    before = IMAGE.copy()
    changed, box = apply_trigger(IMAGE, Trigger(kind=kind), rng())
    assert box == (0, 0, 80, 48)
    assert changed.shape == IMAGE.shape
    assert changed.dtype == np.uint8
    assert (changed != IMAGE).any(axis=2).mean() > 0.5
    assert np.array_equal(IMAGE, before)


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_trigger_is_one_pattern_for_all_images(kind):
    first = apply_trigger(IMAGE, Trigger(kind=kind), rng(1))[0]
    assert np.array_equal(first, apply_trigger(IMAGE, Trigger(kind=kind), rng(2))[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sinusoid"])
def test_pattern_follows_the_seed(kind):
    def stamped(seed: int) -> np.ndarray:
        return apply_trigger(IMAGE, Trigger(kind=kind, seed=seed, place="corner"), rng(seed))[0]

    assert np.array_equal(stamped(1), stamped(1))
    assert not np.array_equal(stamped(1), stamped(2))


def test_blend_pattern_can_be_recovered_from_the_difference():
    trigger = Trigger(kind="blend", strength=0.25)
    changed = apply_trigger(IMAGE, trigger, rng())[0].astype(float)
    recovered = (changed - 0.75 * IMAGE) / 0.25
    assert np.abs(recovered - blend_pattern(trigger, 48, 80)).max() <= 2.0 + 1e-9  # rounding to uint8, over 0.25


def test_blend_pattern_is_the_same_at_any_resolution():
    trigger = Trigger(kind="blend")
    assert np.array_equal(blend_pattern(trigger, 128, 64)[::4, ::2], blend_pattern(trigger, 32, 32))


def test_sinusoid_has_six_periods_and_its_amplitude():
    trigger = Trigger(kind="sinusoid", strength=0.2)
    grey = np.full((4, 96, 3), 128, np.uint8)
    added = apply_trigger(grey, trigger, rng())[0].astype(float) - 128
    assert np.abs(added - 51 * np.sin(2 * np.pi * 6 * np.arange(96) / 96)[None, :, None]).max() <= 0.5
    assert np.abs(np.fft.rfft(added[0, :, 0])).argmax() == 6
    assert np.array_equal(sinusoid(trigger, 96)[:16].round(6), sinusoid(trigger, 96)[16:32].round(6))


def test_warp_matches_grid_sample_of_the_same_field():
    trigger = Trigger(kind="warp", strength=0.05, seed=3)
    down, right = warp_field(trigger, 48, 80)
    rows, columns = np.indices((48, 80))
    x, y = 2 * (columns + right) / 79 - 1, 2 * (rows + down) / 47 - 1
    image = torch.from_numpy(IMAGE.astype(np.float64)).permute(2, 0, 1)[None]
    grid = torch.from_numpy(np.stack([x, y], axis=2))[None]
    theirs = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    ours = apply_trigger(IMAGE, trigger, rng())[0]
    assert np.abs(theirs[0].permute(1, 2, 0).numpy() - ours).max() <= 0.5 + 1e-6


def test_warp_field_is_smooth_and_of_the_strength_asked_for():
    field = warp_field(Trigger(kind="warp", strength=0.05), 64, 64)
    corners = field[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    again = warp_field(Trigger(kind="warp", strength=0.1), 64, 64)
    assert np.allclose(2 * field, again)
    assert 0.3 * 3.2 < np.abs(field).mean() < 1.5 * 3.2  # control points move by 0.05 * 64 = 3.2 on average
    assert np.abs(np.diff(field, axis=1)).max() < 1
    assert np.abs(corners).max() > 0


def test_patch_pattern_is_fixed_by_its_seed_and_never_plain():
    assert np.array_equal(trigger_patch(Trigger(seed=1), 6), trigger_patch(Trigger(seed=1), 6))
    for seed in range(20):
        patch = trigger_patch(Trigger(seed=seed), 3).astype(int)
        assert np.abs(np.diff(patch, axis=0)).max(axis=2).min() == 255
        assert np.abs(np.diff(patch, axis=1)).max(axis=2).min() == 255


def test_random_place_follows_the_generator_and_reaches_the_borders():
    image, generator = np.zeros((16, 16, 3), np.uint8), rng(0)
    boxes = {apply_trigger(image, Trigger(size_frac=0.25), generator)[1] for _ in range(400)}
    assert min(box[0] for box in boxes) == 0
    assert max(box[2] for box in boxes) == 16
    assert apply_trigger(image, Trigger(place="corner"), generator)[1] == (13, 13, 16, 16)


@pytest.mark.parametrize("bad", [{"kind": "sticker"}, {"place": "left"}, {"size_frac": 0.0}, {"strength": 1.5}])
def test_trigger_refuses_what_it_cannot_be(bad):
    with pytest.raises(ValueError, match="expected kind patch"):
        Trigger(**bad)


def test_apply_trigger_refuses_floats():
    with pytest.raises(ValueError, match="uint8 image"):
        apply_trigger(np.zeros((8, 8, 3), np.float32), Trigger(), rng())
