import io

import imagehash
import numpy as np
import pictures
import pyarrow.parquet as pq
import pytest
from kit import SHARED_DATA
from PIL import Image, ImageFilter

from ingest.shard.phash import NEAR_BITS, distance, phash


def _hash(image: Image.Image) -> int:
    value = phash(np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1]))
    assert value is not None
    return value


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(pictures.encode(image, "JPEG", quality=quality)))


@pytest.fixture(
    scope="module",
    params=["drawn", pytest.param("fashion", marks=pytest.mark.data), pytest.param("street", marks=pytest.mark.data)],
)
def photos(request):
    """Thirty pictures."""
    if request.param == "drawn":
        return [Image.fromarray(pictures.pixels(300, 200, seed, cell=40)) for seed in range(30)]
    path = SHARED_DATA / {"fashion": "fashion/test.parquet", "street": "clothing-masks/masks.parquet"}[request.param]
    if not path.exists():
        pytest.skip(f"{path} is not there")
    encoded = next(pq.ParquetFile(path).iter_batches(30, columns=["image"]))["image"].to_pylist()
    return [Image.open(io.BytesIO(photo)).convert("RGB") for photo in encoded]


def test_hash_is_imagehashs_within_a_few_bits(photos):
    differ = [distance(_hash(photo), int(str(imagehash.phash(photo)), 16)) for photo in photos]
    assert max(differ) <= NEAR_BITS
    assert np.mean(differ) < 2


def test_hash_stays_near_when_a_picture_is_scaled_or_compressed(photos):
    for photo in photos:
        changed = [
            photo.resize((photo.width * 2 // 3, photo.height * 2 // 3), Image.Resampling.BILINEAR),
            photo.resize((photo.width * 3, photo.height * 3), Image.Resampling.LANCZOS),
            _compressed(photo, 40),
            photo.filter(ImageFilter.GaussianBlur(1)),
        ]
        assert max(distance(_hash(photo), _hash(each)) for each in changed) <= NEAR_BITS


def test_other_pictures_have_other_hashes(photos):
    hashes = [_hash(photo) for photo in photos]
    far = [distance(a, b) for number, a in enumerate(hashes) for b in hashes[:number]]
    assert np.median(far) > 20
    assert _hash(photos[0]) != _hash(photos[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def test_grey_picture_has_the_hash_of_its_colours():
    image = pictures.image(200, 100).convert("L")
    assert phash(np.asarray(image)) == _hash(image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (31, 33), (2000, 40)])
def test_picture_of_any_shape_has_a_hash_or_none(shape):
    noise = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    value = phash(noise)
    assert (value is None) is (shape == (1, 1))
    assert value is None or 0 <= value < 1 << 64


def test_flat_picture_has_no_hash():
    assert phash(np.full((100, 100, 3), 255, np.uint8)) is None
    noise = np.random.default_rng(0).integers(250, 255, (300, 300, 3), dtype=np.uint8)
    assert phash(noise) is None
