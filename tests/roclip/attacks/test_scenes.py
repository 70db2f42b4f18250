"""Scenes are pure functions of (seed, index), and their masks and captions tell the truth."""

import hashlib
import io
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from roclip.attacks.scenes import LABELS, TEMPLATES, encode, render

SCENES = [render(index, seed=7) for index in range(240)]


def test_render_same_scene_when_asked_again_in_any_order():
    for index in (5, 131, 0):
        again = render(index, seed=7)
        assert np.array_equal(again.image, SCENES[index].image)
        assert again.caption == SCENES[index].caption
        assert np.array_equal(again.mask, SCENES[index].mask)


def test_render_same_scene_in_a_fresh_process():
    code = (
        "import hashlib; from roclip.attacks.scenes import render\n"
        "print(hashlib.sha256(render(31, seed=7).image.tobytes()).hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert fresh.strip() == hashlib.sha256(SCENES[31].image.tobytes()).hexdigest()


def test_render_other_scene_when_seed_or_index_changes():
    assert not np.array_equal(render(3, seed=7).image, render(3, seed=8).image)
    assert len({scene.image.tobytes() for scene in SCENES}) == len(SCENES)


def test_scenes_import_loads_no_torch():
    code = "import sys, roclip.attacks.scenes, roclip.attacks.poisons; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size_px", [32, 64, 96])
def test_render_has_the_size_asked_for(size_px):
    scene = render(4, seed=1, size_px=size_px)
    assert scene.image.shape == (size_px, size_px, 3)
    assert scene.image.dtype == np.uint8
    assert scene.mask.shape == (size_px, size_px)


def test_labels_are_balanced():
    counts = Counter(scene.label for scene in SCENES)
    assert counts == dict.fromkeys(LABELS, len(SCENES) // len(LABELS))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_num_objects_when_fixed(count):
    for index in range(24):
        scene = render(index, seed=2, num_objects=count)
        assert len(scene.objects) == count
        assert len({item.label for item in scene.objects}) == count


def test_scenes_of_one_two_and_three_objects_all_occur_by_default():
    assert set(Counter(len(scene.objects) for scene in SCENES)) == {1, 2, 3}


def test_masks_do_not_overlap_and_the_main_object_is_the_largest():
    for scene in SCENES:
        cover = np.sum([item.mask for item in scene.objects], axis=0)
        areas = [int(item.mask.sum()) for item in scene.objects]
        assert cover.max() == 1
        assert min(areas) >= 40, scene.caption
        assert areas[0] == max(areas), scene.caption


def test_semantic_mask_agrees_with_the_objects():
    for scene in SCENES:
        expected = {0} | {1 + LABELS.index(item.label) for item in scene.objects}
        assert set(np.unique(scene.mask)) == expected
        main = scene.objects[0]
        assert np.array_equal(scene.mask == 1 + LABELS.index(main.label), main.mask)


def test_mask_covers_the_pixels_that_the_color_is_painted_on():
    """Only the object is strongly red: where the image is, the mask is set, but for edge pixels."""
    seen = 0
    for index in range(400):
        scene = render(index, seed=7, num_objects=1)
        main = scene.objects[0]
        if (main.color, main.texture) != ("red", "plain"):
            continue
        red, green, blue = np.moveaxis(scene.image.astype(int), 2, 0)
        strong = (red > 150) & (green < 65) & (blue < 65)
        assert strong[main.mask].mean() > 0.1
        assert strong[~main.mask].sum() <= 0.02 * main.mask.sum()
        seen += 1
    assert seen >= 5


def test_caption_names_every_object_and_nothing_else():
    for scene in SCENES:
        named = {label for label in LABELS if re.search(rf"\b{label}\b", scene.caption)}
        assert named == {item.label for item in scene.objects}, scene.caption


def test_captions_vary():
    assert len({scene.caption for scene in SCENES}) > 0.8 * len(SCENES)
    forms = {re.sub(r"\b(" + "|".join(LABELS) + r")\b", "*", scene.caption) for scene in SCENES}
    assert len(forms) > 100


def test_templates_take_a_label():
    assert all(template.format("ball").count("ball") == 1 for template in TEMPLATES)


def test_encode_png_is_lossless():
    image = SCENES[0].image
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(image)))), image)
    assert Image.open(io.BytesIO(encode(image, "jpeg"))).format == "JPEG"


@pytest.mark.parametrize("bad", [{"index": -1}, {"size_px": 8}, {"num_objects": 4}])
def test_render_says_what_is_allowed_when_asked_for_too_much(bad):
    with pytest.raises(ValueError, match="expected index >= 0"):
        render(**({"index": 0} | bad), seed=0)
