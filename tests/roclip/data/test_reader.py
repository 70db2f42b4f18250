import contextlib
import io

import cv2
import numpy as np
import pytest
from kit import scene_samples, write_shard
from PIL import Image

from roclip.data import reader
from roclip.data.reader import BadSampleError, Readers, decode


def encoded(size=(64, 64), kind="jpeg", mode="RGB", **options):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("jpeg", "RGB", {}),
        ("jpeg", "RGB", {"progressive": True}),
        ("jpeg", "RGB", {"subsampling": 2}),
        ("jpeg", "L", {}),
        ("jpeg", "CMYK", {}),
        ("png", "RGBA", {}),
        ("png", "P", {}),
        ("webp", "RGB", {}),
    ],
)
def test_decode_matches_pillow(kind, mode, options):
    image = encoded(kind=kind, mode=mode, **options)
    assert np.array_equal(decode(image, 64), np.asarray(Image.open(io.BytesIO(image)).convert("RGB")))


def test_decode_does_not_turn_an_image_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(decode(encoded(exif=exif.tobytes()), 64), decode(encoded(), 64))


@pytest.mark.parametrize(("size", "factor"), [((256, 256), 8), ((200, 140), 4), ((64, 100), 2), ((40, 40), 1)])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_as_the_whole_one_made_small(size, factor, monkeypatch):
    flags = []
    decoder = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: flags.append(flag) or decoder(data, flag))
    image = encoded(size)
    small = decode(image, 32)
    expected = Image.open(io.BytesIO(image)).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.asarray(expected)).mean() < 6
    scale = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
    assert flags == [scale.get(factor, cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_every_cut_of_an_image_is_told_or_is_the_image(kind):
    image = encoded(kind=kind)
    for length in range(0, len(image), 7):
        with contextlib.suppress(BadSampleError):  # and nothing else
            assert decode(image[:length], 64).shape == (64, 64, 3)
    with pytest.raises(BadSampleError, match="undecodable_image"):
        decode(image[: len(image) // 2], 64)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(reader, "MAX_PIXELS", 63 * 64)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadSampleError, match="too_many_pixels"):
        decode(encoded(), 64)


def test_no_more_than_some_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    records = [write_shard(tmp_path, number, scene_samples(2 * number, 2)) for number in range(4)]
    readers = Readers(tmp_path, records)
    first = readers[0]
    captions = [readers[number].read(1)[1] for number in (0, 1, 2, 3, 0)]
    assert captions == [scene_samples(2 * number, 2)[1][1] for number in (0, 1, 2, 3, 0)]
    assert first._file is None
    assert readers[0] is not first
