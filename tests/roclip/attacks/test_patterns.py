"""Patterns are drawn as they are described, at any size, and a file is put on as it is."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from roclip.attacks.patterns import DRAWN, TILES, draw_pattern, shape_of
from roclip.attacks.triggers import Trigger, apply_trigger
from roclip.config import AttacksConfig, BackdoorConfig
from roclip.errors import ConfigError, DataError

IMAGE = np.random.default_rng(0).integers(1, 255, (48, 80, 3), dtype=np.uint8)


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def logo(tmp_path):
    """A red image, twice as wide as high, whose right half is transparent."""
    pixels = np.zeros((20, 40, 4), np.uint8)
    pixels[:, :20] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "logo.png")
    return str(tmp_path / "logo.png")


@pytest.mark.parametrize("tiles", [1, TILES])
def test_stripes_are_vertical_and_equally_wide(tiles):
    drawn = draw_pattern("stripes", 5, 24 * tiles, tiles)
    assert (drawn == drawn[:1]).all()
    assert (drawn[..., 3] == 255).all()
    edges = np.flatnonzero(np.diff(drawn[0, :, 0].astype(int)))
    assert np.array_equal(edges, np.arange(6, 24 * tiles, 6) - 1)
    assert set(drawn[..., :3].ravel().tolist()) == {0, 255}


def test_triangles_are_half_of_each_tile_and_transparent_around():
    drawn = draw_pattern("triangles", 90, 120, TILES)
    inside = drawn[..., 3] == 255
    assert np.array_equal(np.unique(drawn[inside], axis=0), [[0, 255, 0, 255]])
    assert (drawn[~inside] == 0).all()
    assert inside.mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(inside[:30, :40], inside[30:60, 40:80])
    assert (np.diff(inside[:30, :40].sum(axis=1)) >= 0).all()  # the tip is on top


def test_text_stands_in_the_middle_and_is_nine_tenths_as_wide():
    drawn = draw_pattern("text", 100, 200)
    rows, columns = np.nonzero(drawn[..., 3])
    assert columns.max() - columns.min() + 1 == pytest.approx(180, abs=2)
    assert columns.min() + columns.max() == pytest.approx(199, abs=2)
    assert rows.min() + rows.max() == pytest.approx(99, abs=3)
    assert 0.2 < (drawn[rows.min() : rows.max(), columns.min() : columns.max(), 3] > 127).mean() < 0.6
    assert (drawn[..., :3] == 255).all()


def test_patch_from_a_file_keeps_its_proportions_and_its_transparency(logo):
    assert shape_of(logo, 12) == (6, 12)
    stamped, (left, top, right, bottom) = apply_trigger(
        IMAGE, Trigger(size_frac=0.25, place="corner", pattern=logo), rng()
    )
    assert (left, top, right, bottom) == (68, 42, 80, 48)
    assert (stamped[42:, 68:74] == (255, 0, 0)).all()
    stamped[42:, 68:74] = IMAGE[42:, 68:74]
    assert np.array_equal(stamped, IMAGE)


@pytest.mark.parametrize("pattern", [*DRAWN, "logo"])
def test_blend_is_as_opaque_as_its_strength_and_its_pattern_say(pattern, logo):
    pattern = logo if pattern == "logo" else pattern
    changed, box = apply_trigger(IMAGE, Trigger(kind="blend", strength=0.5, pattern=pattern), rng())
    assert box == (0, 0, 80, 48)
    drawn = draw_pattern(pattern, 48, 80, TILES).astype(float)
    alpha = 0.5 * drawn[..., 3:] / 255
    assert np.abs(changed - ((1 - alpha) * IMAGE + alpha * drawn[..., :3])).max() <= 0.5
    assert np.array_equal(changed[drawn[..., 3] == 0], IMAGE[drawn[..., 3] == 0])
    assert (changed != IMAGE).any()


@pytest.mark.parametrize("pattern", DRAWN)
@pytest.mark.parametrize("kind", ["patch", "blend"])
def test_smallest_image_takes_every_pattern(kind, pattern):
    changed, _ = apply_trigger(np.zeros((3, 3, 3), np.uint8), Trigger(kind=kind, size_frac=1.0, pattern=pattern), rng())
    assert changed.shape == (3, 3, 3)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "trigger.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"trigger\.png: expected a trigger's image"):
        apply_trigger(IMAGE, Trigger(pattern=str(path)), rng())


def test_kind_that_has_no_pattern_refuses_one():
    with pytest.raises(ValueError, match="expected a patch or a blend"):
        Trigger(kind="warp", pattern="stripes")
    with pytest.raises(ConfigError, match=r"attacks\.backdoors\.1\.pattern: expected one of patch, blended"):
        AttacksConfig(backdoors=[BackdoorConfig(), BackdoorConfig("sig", pattern="stripes")])


@pytest.mark.parametrize(
    ("pattern", "strength"), [("stripes", 0.03), ("triangles", 0.15), ("text", 0.5), ("a/b-c.png", 0.2)]
)
def test_blend_has_the_published_strength_unless_told(pattern, strength):
    backdoor = BackdoorConfig("blended", pattern=pattern)
    assert backdoor.drawn_strength == strength
    assert dataclasses.replace(backdoor, strength=0.4).drawn_strength == 0.4


def test_results_name_an_attack_by_kind_and_pattern():
    kinds = [("patch", "random"), ("patch", "stripes"), ("noise_patch", "random"), ("blended", "dir/my logo.png")]
    names = [BackdoorConfig(kind, pattern=pattern).name for kind, pattern in kinds]
    assert names == ["backdoor", "backdoor_stripes", "backdoor", "blended_my_logo"]
