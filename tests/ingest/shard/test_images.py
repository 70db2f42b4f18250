import io
import json
import os
import subprocess
import sys

import cv2
import exifread
import numpy as np
import pictures
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import REPOSITORY, SHARED_DATA
from PIL import Image

from ingest.shard import img2dataset_shim
from ingest.shard.images import MAX_EXIF_CHARS, decode, describe_exif, read_header
from ingest.shard.resize import Resize
from roclip.config import FetchPolicy, IngestConfig
from roclip.data.outcomes import REASONS, FetchError, reason_of

pytestmark = pytest.mark.filterwarnings("ignore:value is deprecated:DeprecationWarning")  # in img2dataset's own resizer
CONFIG = IngestConfig()
WELCOME = {
    "jpeg": pictures.jpeg(),
    "progressive": pictures.jpeg(progressive=True),
    "grey jpeg": pictures.encode(pictures.image().convert("L"), "JPEG"),
    "png": pictures.encode(pictures.image(), "PNG"),
    "grey png": pictures.encode(pictures.image().convert("L"), "PNG"),
    "one bit": pictures.encode(pictures.image().convert("1"), "PNG"),
    "palette": pictures.encode(pictures.image().convert("P"), "PNG"),
    "transparent palette": pictures.encode(pictures.image().convert("P"), "PNG", transparency=3),
    "grey with alpha": pictures.encode(pictures.with_alpha().convert("LA"), "PNG"),
    "alpha": pictures.encode(pictures.with_alpha(), "PNG"),
    "webp": pictures.encode(pictures.image(), "WEBP", quality=90),
    "webp with alpha": pictures.encode(pictures.with_alpha(), "WEBP", lossless=True),
    "gif": pictures.encode(pictures.image(), "GIF"),
    "bmp": pictures.encode(pictures.image(), "BMP"),
    "cmyk": pictures.encode(pictures.image().convert("CMYK"), "JPEG", quality=95),
    "two pictures": pictures.encode(pictures.image(), "MPO", save_all=True, append_images=[pictures.image(seed=1)]),
}


def _take(content, config=CONFIG):
    header = read_header(content, config)
    return header, decode(content, header)


def _reason(content, config=CONFIG):
    with pytest.raises(FetchError) as refused:
        _take(content, config)
    return reason_of(str(refused.value))


def _near(bgr, width=96, height=64):
    """Mean difference to the picture that `pictures.image` draws, in grey levels."""
    assert bgr.shape == (height, width, 3), bgr.shape
    return np.abs(bgr[..., ::-1].astype(int) - pictures.pixels(width, height)).mean()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_an_image"),
        (pictures.HTML, "not_an_image"),
        (pictures.SVG, "not_an_image"),
        (pictures.PDF + pictures.jpeg(), "not_an_image"),
        (b"PK\x03\x04" + pictures.jpeg(), "not_an_image"),
        (pictures.encode(pictures.image(), "TIFF"), "not_an_image"),
        (pictures.encode(pictures.image(), "ICO"), "not_an_image"),
        (pictures.encode(pictures.image(), "PPM"), "not_an_image"),
        (b"\xff\xd8\xff\xe0\0\4ab" + b"a" * 600_000, "undecodable"),  # a header that goes on and on
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "undecodable"),
        (pictures.png_bomb(), "too_many_pixels"),
        (pictures.scan_bomb(), "too_many_pixels"),
        (pictures.jpeg()[:700], "undecodable"),
        (pictures.jpeg()[:-2], "undecodable"),
        (pictures.encode(pictures.image(), "PNG")[:700], "undecodable"),
        (pictures.encode(pictures.image(), "GIF")[:-700], "undecodable"),
        (pictures.encode(pictures.image(), "WEBP")[:-100], "undecodable"),
        (pictures.encode(pictures.image(), "BMP")[:-100], "undecodable"),
        (pictures.encode(pictures.image(), "AVIF")[:-100], "undecodable"),
        (pictures.encode(pictures.image(), "PNG").replace(b"IDAT", b"IDAX"), "not_an_image"),
    ],
)
def test_bad_image_is_refused_under_a_name(content, reason):
    assert _reason(content) == reason


def test_largest_bomb_is_small_as_a_file():
    assert len(pictures.png_bomb()) < 1 << 20


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy": FetchPolicy(max_pixels=96 * 64 - 1)}, "too_many_pixels"),
        ({"min_image_size": 65}, "too_small"),
        ({"max_aspect_ratio": 1.49}, "aspect_ratio"),
    ],
)
def test_image_outside_of_the_bounds_is_refused_and_at_the_bounds_taken(options, reason):
    assert _reason(pictures.jpeg(), IngestConfig(**options)) == reason
    at_the_bounds = IngestConfig(policy=FetchPolicy(max_pixels=96 * 64), min_image_size=64, max_aspect_ratio=1.5)
    assert _take(pictures.jpeg(), at_the_bounds)[1].shape == (64, 96, 3)


@pytest.mark.parametrize("mode", ["keep_ratio", "center_crop"])
def test_long_image_is_refused_when_its_shorter_side_would_be_blown_up(mode):
    thread = pictures.encode(Image.new("RGB", (3000, 2)), "PNG")
    assert _reason(thread, IngestConfig(resize_mode=mode)) == "too_many_pixels"
    for harmless in ({"resize_mode": "border"}, {"resize_mode": mode, "resize_only_if_bigger": True}):
        assert read_header(thread, IngestConfig(**harmless)).width == 3000


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_first_frame_is_taken_or_the_image_refused_as_the_policy_says(kind):
    header, first = _take(pictures.animated(kind))
    assert header.flags == ("first_frame",)
    assert _near(first) < 12  # GIF has 256 colours, AVIF is lossy
    assert _reason(pictures.animated(kind), IngestConfig(policy=FetchPolicy(animated="refuse"))) == "animated"


@pytest.mark.parametrize("name", WELCOME)
def test_pixels_are_those_of_img2dataset_where_nothing_is_to_be_put_right(name):
    header, pixels = _take(WELCOME[name])
    theirs = cv2.imdecode(np.frombuffer(WELCOME[name], np.uint8), cv2.IMREAD_UNCHANGED)
    if theirs.ndim == 3 and theirs.shape[2] == 4:  # as img2dataset's resizer does it
        alpha = theirs[:, :, 3, np.newaxis]
        theirs = np.rint((alpha / 255 * theirs[..., :3] + 255 - alpha).clip(min=0, max=255)).astype(np.uint8)
    assert header.flags == ()
    np.testing.assert_array_equal(pixels, theirs)


def test_cmyk_keeps_its_colours():
    assert _near(_take(WELCOME["cmyk"])[1]) < 6


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_become_eight(channels):
    header, pixels = _take(pictures.sixteen_bits(channels))
    assert header.flags == ("sixteen_bit",)
    expected = pictures.pixels()[..., ::-1]
    if channels == 1:
        np.testing.assert_array_equal(pixels, expected[..., 0])
    elif channels == 3:
        np.testing.assert_array_equal(pixels, expected)
    else:
        np.testing.assert_allclose(pixels, 128 / 255 * expected + 127, atol=0.51)


def test_ten_bit_avif_is_not_dark():
    deep = pictures.pixels()[..., ::-1].astype(np.uint16) * 4
    content = cv2.imencode(".avif", deep, [cv2.IMWRITE_AVIF_DEPTH, 10, cv2.IMWRITE_AVIF_QUALITY, 100])[1].tobytes()
    assert _near(_take(content)[1]) < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_image_is_stored_upright(orientation):
    for kind in ("JPEG", "PNG", "WEBP"):
        options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
        header, pixels = _take(pictures.turned(orientation, kind, **options))
        assert header.flags == (("turned",) if orientation > 1 else ())
        assert _near(pixels) < 3


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 99]
)
def test_damaged_exif_leaves_the_image_as_it_is(damage):
    header, pixels = _take(pictures.jpeg(exif=damage))
    assert header.orientation == 1
    assert _near(pixels) < 6


def test_bytes_are_kept_only_when_nothing_is_wrong_with_them():
    keeps = {
        kind: IngestConfig(skip_reencode=True, encode_format=kind, encode_quality=9) for kind in ("jpg", "png", "webp")
    }
    plain = {"jpg": pictures.jpeg(), "png": WELCOME["png"], "webp": WELCOME["webp"]}
    for kind, content in plain.items():
        assert read_header(content, keeps[kind]).keep
        assert not read_header(content, IngestConfig()).keep
        assert not read_header(pictures.with_zip_behind(content), keeps[kind]).keep
        assert not read_header(content + b"\0", keeps[kind]).keep
    others = {
        "jpg": ["png", "cmyk", "two pictures"],
        "png": ["jpeg", "alpha", "palette", "transparent palette", "one bit", "grey with alpha"],
        "webp": ["jpeg", "webp with alpha"],
    }
    for kind, names in others.items():
        assert [name for name in names if read_header(WELCOME[name], keeps[kind]).keep] == []
    assert not read_header(pictures.turned(6), keeps["jpg"]).keep
    assert not read_header(pictures.sixteen_bits(3), keeps["png"]).keep
    assert not read_header(pictures.animated("WEBP"), keeps["webp"]).keep


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_image_is_taken_or_refused_under_a_name(data):
    content = bytearray(data.draw(st.sampled_from(list(WELCOME.values()))))
    for at in data.draw(st.lists(st.integers(0, min(len(content), 2000) - 1), max_size=20)):
        content[at] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    describe_exif(content)
    reason = ""
    try:
        _, pixels = _take(content, IngestConfig(policy=FetchPolicy(max_pixels=1 << 20)))
    except FetchError as error:
        reason = reason_of(str(error))
    if reason:
        assert reason in REASONS
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2 or pixels.shape[2] == 3


MEMORY = """
import sys
from pathlib import Path
from ingest.shard import img2dataset_shim
img2dataset_shim.bound_decoders(64 * 2**20)
from ingest.shard.images import decode, read_header
from roclip.config import IngestConfig

def look_at(content):
    try:
        decode(content, read_header(content, IngestConfig()))
    except OSError as error:
        return str(error).partition(":")[0]
    return "taken"

def peak_mib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

look_at(Path(sys.argv[1]).read_bytes())
before = peak_mib()
for path in sys.argv[2:]:
    print(look_at(Path(path).read_bytes()), peak_mib() - before)
"""


def test_memory_stays_capped(tmp_path):
    contents = [
        pictures.jpeg(),
        pictures.png_bomb(),
        pictures.scan_bomb(),
        pictures.sixteen_bits(4, 3000, 3000),
    ]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    command = [sys.executable, "-c", MEMORY, *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    (bomb, bomb_mib), (scans, scans_mib), (large, large_mib) = (line.split() for line in done.stdout.splitlines())
    assert (bomb, scans, large) == ("too_many_pixels", "too_many_pixels", "taken")
    assert int(bomb_mib) < 8  # 244 when it is decoded
    assert int(scans_mib) < 8
    assert int(large_mib) < 300  # 675 more by img2dataset's way to lay it on white


def test_opencv_has_a_bound_of_its_own():
    script = (
        "import sys; from ingest.shard import img2dataset_shim; img2dataset_shim.bound_decoders(5000); import cv2, numpy\n"
        "try: print(cv2.imdecode(numpy.frombuffer(sys.stdin.buffer.read(), numpy.uint8), -1))\n"
        "except cv2.error as error: print('refused')"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pictures.jpeg(),
        capture_output=True,
        timeout=60,
        env=environment,
        check=True,
    )
    assert done.stdout.split() in ([b"None"], [b"refused"])


def _theirs(content, config):
    """What img2dataset's own resizer makes of an image."""
    resizer = img2dataset_shim.resizer().Resizer(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        encode_quality=config.encode_quality,
        encode_format=config.encode_format,
        skip_reencode=config.skip_reencode,
    )
    *resized, error = resizer(io.BytesIO(content))
    assert error is None, error
    return resized


def _ours(content, config, resize):
    header, pixels = _take(content, config)
    return list(resize(content, pixels, keep=header.keep))


SIZES = [(64, 64), (65, 64), (1, 1), (1, 7), (63, 31), (31, 63), (200, 100), (100, 201), (500, 3), (129, 128)]
MODES = ["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only_if_bigger", [False, True])
def test_stored_image_is_img2datasets_for_every_size(mode, only_if_bigger):
    config = IngestConfig(image_size=64, resize_mode=mode, resize_only_if_bigger=only_if_bigger)
    resize = Resize(config)
    for width, height in SIZES:
        content = pictures.jpeg(width, height, seed=width)
        assert _ours(content, config, resize) == _theirs(content, config), (width, height)


@pytest.mark.parametrize(
    ("kind", "quality"), [("jpg", 95), ("jpg", 40), ("png", 0), ("png", 9), ("webp", 80), ("webp", 100)]
)
@pytest.mark.parametrize("skip", [False, True])
def test_stored_image_is_img2datasets_for_every_format(kind, quality, skip):
    for mode in ("border", "no"):
        config = IngestConfig(
            image_size=64, resize_mode=mode, encode_format=kind, encode_quality=quality, skip_reencode=skip
        )
        resize = Resize(config)
        for name, content in WELCOME.items():
            mismatches = (
                skip
                and mode == "no"
                and (kind, name)
                in {
                    ("jpg", "two pictures"),  # what follows the first is not stored
                    ("png", "palette"),
                    ("png", "one bit"),
                }
            )
            assert (_ours(content, config, resize) == _theirs(content, config)) is not mismatches, (mode, name)


@pytest.mark.data
@pytest.mark.parametrize("folder", ["fashion/test.parquet", "clothing-masks/masks.parquet"])
def test_stored_photo_is_img2datasets(folder):
    path = SHARED_DATA / folder
    if not path.exists():
        pytest.skip(f"{path} is not there")
    photos = next(pq.ParquetFile(path).iter_batches(25, columns=["image"]))["image"].to_pylist()
    for mode in MODES:
        config = IngestConfig(image_size=128, resize_mode=mode)
        resize = Resize(config)
        for photo in photos:
            assert _ours(photo, config, resize) == _theirs(photo, config)


def test_image_that_cannot_be_encoded_is_undecodable():
    config = IngestConfig(resize_mode="no", encode_format="webp")
    content = pictures.encode(Image.new("RGB", (20_000, 2)), "PNG")  # WebP ends at 16,383
    with pytest.raises(FetchError, match="undecodable"):
        _ours(content, config, Resize(config))


def _their_exif(content):
    try:
        tags = exifread.process_file(io.BytesIO(content), details=False)
        return json.dumps({k: str(v).strip() for k, v in tags.items() if v is not None})
    except Exception:
        return None


def _photo_exif():
    known = Image.Exif()
    known.update({0x010F: "Canon", 0x0110: "EOS 5D", 0x0112: 6, 0x0132: "2024:01:02 03:04:05", 0x013B: "Ж. Пётр"})
    known.get_ifd(0x8769).update({0x829A: (1, 250), 0x829D: 2.8, 0x9003: "2024:01:02 03:04:05", 0xA434: "50mm"})
    known.get_ifd(0x8825).update({1: "N", 2: (52.0, 30.0, 0.5), 3: "E", 4: (13.0, 24.0, 1.5)})
    return known


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_exif_is_what_img2dataset_notes(kind):
    with_exif = pictures.encode(pictures.image(), kind, exif=_photo_exif())
    assert describe_exif(with_exif) == _their_exif(with_exif)
    assert ("Canon" in describe_exif(with_exif)) is (kind != "PNG")  # exifread does not know PNG
    for content in WELCOME.values():
        assert describe_exif(content) == _their_exif(content)


def test_exif_that_does_not_end_is_left_out():
    bomb = pictures.exif_bomb()
    assert len(_their_exif(bomb)) > 20_000_000
    assert describe_exif(bomb) is None
    long = Image.Exif()
    long[0x010E] = "a" * MAX_EXIF_CHARS
    assert describe_exif(pictures.jpeg(exif=long)) is None
