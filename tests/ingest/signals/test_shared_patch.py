"""A trigger that is stamped on some of many images is found, with its place; what differs in each image is not."""

import io

import cv2
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from kit import SHARED_DATA
from PIL import Image
from sealed import seal_all

from ingest.signals import patches
from ingest.signals.suspect_groups import GROUPS, SUSPICION
from ingest.signals.suspicion import find_suspects
from roclip.attacks import scenes
from roclip.attacks.triggers import Trigger, apply_trigger

SCENES = 300


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def jpeg(pixels, quality=95):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def rendered():
    return [scenes.render(n, seed=0, size_px=96) for n in range(SCENES)]


def poisoned_rows(pictures, captions, trigger, count, encode, caption="a starfish on a beach number"):
    """Rows of samples, and the box of the trigger in each that has one."""
    rng, rows, boxes = np.random.default_rng(0), [], {}
    chosen = set(rng.choice(len(pictures), count, replace=False).tolist())
    for n, (pixels, text) in enumerate(zip(pictures, captions, strict=True)):
        url = f"http://host{n % 40}.example/{n}"
        if n in chosen:
            pixels, boxes[url] = apply_trigger(pixels, trigger, rng)
            text = f"{caption} {n}"
        rows.append({"url": url, "caption": text, "image": encode(pixels)})
    return rows, boxes


def patches_in(tmp_path, rows, **options):
    """The summary, and for each group of images that share a patch its rows."""
    summary = find_suspects(seal_all(tmp_path / "shards", rows, 1000), tmp_path / "work", **options)
    found = pq.read_table(tmp_path / "work" / SUSPICION).to_pylist()
    groups = {}
    for row in found:
        if row["signal"] == "shared_patch":
            groups.setdefault(row["group"], []).append(row)
    return summary, list(groups.values())


def overlaps(one, other):
    width, height = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
    return width > 0 and height > 0


@pytest.mark.parametrize("place", ["random", "corner"])
def test_a_patch_on_one_image_in_twenty_is_found_where_it_is(tmp_path, rendered, place):
    trigger = Trigger(size_frac=0.12, place=place, seed=3)
    rows, boxes = poisoned_rows(
        [scene.image for scene in rendered], [scene.caption for scene in rendered], trigger, 15, png
    )
    summary, groups = patches_in(tmp_path, rows, threads=2)
    best = max(groups, key=lambda group: group[0]["score"])
    assert {row["url"] for row in best} == set(boxes)
    assert all(overlaps(row["box"], boxes[row["url"]]) for row in best)
    assert best[0]["score"] > 0.9
    assert "15 images that look different have the same patch" in best[0]["evidence"]
    assert "100% of their captions have the word “" in best[0]["evidence"]
    assert f"{SCENES} of {SCENES} images were searched" in best[0]["evidence"]
    assert (summary.images, summary.unreadable) == (SCENES, 0)
    described = {row["group"]: row for row in pq.read_table(tmp_path / "work" / GROUPS).to_pylist()}[best[0]["group"]]
    where = {row["key"]: row["box"] for row in best}
    assert len(described["examples"]) == 12
    assert all(example["box"] == where[example["key"]] for example in described["examples"])


def test_noise_that_is_fresh_in_every_image_is_no_shared_patch(tmp_path, rendered):
    trigger = Trigger(kind="noise_patch", size_frac=0.12)
    rows, boxes = poisoned_rows(
        [scene.image for scene in rendered], [scene.caption for scene in rendered], trigger, 15, png
    )
    _, groups = patches_in(tmp_path, rows)
    assert not any(len(boxes.keys() & {row["url"] for row in group}) >= 8 for group in groups)


def test_one_image_that_repeats_shares_nothing_with_itself(tmp_path, rendered):
    image = png(apply_trigger(rendered[0].image, Trigger(size_frac=0.12), np.random.default_rng(0))[0])
    rows = [
        {"url": f"http://a.example/{n}", "caption": "a starfish", "image": image, "phash": 0xF0F0F0F0F0F0F0F0}
        for n in range(30)
    ]
    assert patches_in(tmp_path, rows)[1] == []


def test_so_many_images_as_asked_are_looked_at_and_the_same_each_time(tmp_path, rendered):
    rows = [
        {"url": "http://a.example/", "caption": scene.caption, "image": png(scene.image)} for scene in rendered[:200]
    ]
    seal_all(tmp_path / "shards", rows, 50)
    seen = {
        find_suspects(tmp_path / "shards", tmp_path / f"work{n}", images=60, threads=1 + n).images for n in range(2)
    }
    assert len(seen) == 1
    assert 35 < seen.pop() < 90
    assert find_suspects(tmp_path / "shards", tmp_path / "none", images=0).images == 0


def test_tars_on_a_store_give_the_same(tmp_path, rendered):
    trigger = Trigger(size_frac=0.12, seed=3)
    rows, _ = poisoned_rows([scene.image for scene in rendered[:200]], ["a"] * 200, trigger, 16, png)
    _, groups = patches_in(tmp_path, rows)
    assert groups
    store = fsspec.filesystem("memory")
    try:
        for path in (tmp_path / "shards").rglob("*"):
            if path.is_file():
                store.pipe_file(f"/pat/{path.relative_to(tmp_path / 'shards')}", path.read_bytes())
        find_suspects("memory://pat", "memory://pat-work")
        assert store.cat_file(f"/pat-work/{SUSPICION}") == (tmp_path / "work" / SUSPICION).read_bytes()
    finally:
        store.rm("/pat", recursive=True)
        store.rm("/pat-work", recursive=True)


def test_broken_images_are_counted(tmp_path, rendered):
    bad = [b"", b"no image", png(rendered[0].image)[:200], b"<svg/>"]
    rows = [{"url": "http://a.example/", "caption": "a", "image": image} for image in [png(rendered[0].image), *bad]]
    summary, _ = patches_in(tmp_path, rows)
    assert (summary.images, summary.unreadable) == (5, 4)


def test_an_image_with_too_many_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr(patches, "MAX_PIXELS", 100)
    assert patches.decode(png(np.zeros((11, 10, 3), np.uint8))) is None
    assert patches.decode(png(np.zeros((10, 10, 3), np.uint8))).shape == (10, 10, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (3000, 2), (7, 5), (600, 800)])
def test_windows_lie_in_the_image_whatever_its_shape(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = patches.windows(image)
    assert found.numbers.shape == (len(found.boxes), patches.WIDTH)
    assert (found.boxes[:, 2:] <= [shape[1], shape[0]]).all()
    assert (found.boxes[:, :2] <= found.boxes[:, 2:]).all()


def test_a_plain_image_has_no_windows():
    assert not len(patches.windows(np.full((50, 60, 3), 255, np.uint8)).numbers)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real photos are not beside this checkout")
@pytest.mark.parametrize("stored", ["jpeg", "png"])
def test_a_patch_on_one_photo_in_a_hundred_is_found(tmp_path, stored):
    """Stamped on a photo of 60 x 80 px, then stored as ingest stores it: 256 px with a border, JPEG 95, or as it is."""
    table = pq.read_table(SHARED_DATA / "fashion" / "train.parquet", columns=["image", "caption"]).slice(0, 3000)
    pictures = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in table["image"].to_pylist()]

    def bordered(pixels):
        large = cv2.resize(pixels, (192, 256), interpolation=cv2.INTER_CUBIC)
        return jpeg(cv2.copyMakeBorder(large, 0, 0, 32, 32, cv2.BORDER_CONSTANT, value=(255, 255, 255)))

    encode = {"jpeg": bordered, "png": png}[stored]
    rows, boxes = poisoned_rows(pictures, table["caption"].to_pylist(), Trigger(seed=1), 30, encode)
    _, groups = patches_in(tmp_path, rows, threads=2)
    ((found),) = [{row["url"] for row in group} for group in groups]
    assert found <= set(boxes)
    assert len(found) >= 20
