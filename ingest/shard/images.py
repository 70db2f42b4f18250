"""Checks fetched images by their headers, and decodes those that pass.

Nothing is decoded before the header has been checked. What OpenCV gets wrong, or leaves as training cannot use it, is corrected
here: 16 bits become 8, images are turned upright by their EXIF orientation, and transparency is blended onto white block by
block, because img2dataset's way takes 75 bytes per pixel. If there is nothing to correct, the pixels equal img2dataset's.

TIFF, which img2dataset accepts, is refused: hardly any browser shows it, and a TIFF of one pixel can demand a gigabyte.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import exifread
import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from roclip.config import IngestConfig
from roclip.data.outcomes import FetchError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""Pillow's formats that are accepted."""
ENCODED = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""`ingest.encode_format` -> Pillow's format name."""
MAX_SCANS = 16
"""Most passes of a JPEG over its pixels at the largest allowed size; a smaller image may have more."""
FLAGS = {
    "first_frame": "an image of several frames, of which the first is stored",
    "turned": "turned upright, as its EXIF says",
    "sixteen_bit": "stored with 8 bits of its 16",
}
"""Flags of images that were accepted with corrections."""
MAX_EXIF_CHARS = 16 * 2**10
"""A longer EXIF text is dropped."""
_HEADER_READS, _EXIF_READS = 500_000, 20_000
_READ_BYTES = 256
_BLOCK_PX = 1 << 20
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_TO_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
"""EXIF orientation -> the transform that turns the image upright."""
logging.getLogger("exifread").setLevel(logging.CRITICAL)  # it logs a warning for every image without EXIF


@dataclass(frozen=True)
class ImageHeader:
    """The facts in an image's header."""

    format: str
    width: int
    """In pixels, as stored: before the image is turned upright."""
    height: int
    orientation: int
    """EXIF orientation, 1 to 8."""
    scans: int
    """Passes of a progressive JPEG over its pixels; 1 for other images."""
    keep: bool
    """Whether `ingest.skip_reencode` may store these very bytes: format and pixels are right, and nothing follows the image."""
    flags: tuple[str, ...]
    """Names from `FLAGS`."""


class BoundedReader(io.BytesIO):
    """Bytes with a limited number of reads, where 256 bytes count as one: for parsers that loop in Python over untrusted
    offsets.
    """

    def __init__(self, content: bytes, reads: int):
        super().__init__(content)
        self._left = reads

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self._left -= 1 + len(piece) // _READ_BYTES
        if self._left < 0:
            raise FetchError("undecodable", "a header that needs too many reads")
        return piece


def read_header(content: bytes, config: IngestConfig) -> ImageHeader:
    """Read and check the header of an image. Decodes nothing.

    Raises `FetchError`: not_an_image, undecodable, too_many_pixels, animated, too_small, aspect_ratio.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns about is refused below or harmless
            with Image.open(BoundedReader(content, _HEADER_READS), formats=FORMATS) as image:
                header = _header(image, content, config)
    except FetchError:
        raise
    except UnidentifiedImageError as error:
        raise FetchError("not_an_image", f"expected {', '.join(FORMATS)}, got {content[:12]!r}") from error
    except Image.DecompressionBombError as error:
        raise FetchError("too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's plugins can raise anything on damaged bytes
        raise FetchError("undecodable", f"a damaged header ({type(error).__name__})") from error
    _check_limits(header, config)
    return header


def decode(content: bytes, header: ImageHeader) -> np.ndarray:
    """Decode the first frame as (H, W) grey or (H, W, 3) BGR, uint8, upright, blended onto white.

    Raises `FetchError`: undecodable.
    """
    pixels = _decode_avif(content) if header.format == "AVIF" else _decode(content)
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        raise FetchError("undecodable", f"{header.format} of {len(content)} bytes is damaged or truncated")
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = _on_white(pixels)
    rotate = _TO_UPRIGHT.get(header.orientation)
    return rotate(pixels) if rotate else pixels


def describe_exif(content: bytes) -> str | None:
    """The EXIF tags as img2dataset stores them: one JSON object of texts, `{"Image Make": "…", …}`, without maker notes.

    None if exifread fails or finds more than `MAX_EXIF_CHARS`. exifread is plain Python that follows offsets in the file, so the
    number of its reads is bounded.
    """
    try:
        tags = exifread.process_file(BoundedReader(content, _EXIF_READS), details=False)
        text = json.dumps({name: str(value).strip() for name, value in tags.items() if value is not None})
    except Exception:  # as img2dataset does: a hostile file can make exifread raise anything
        return None
    return text if len(text) <= MAX_EXIF_CHARS else None


def _header(image: ImageFile.ImageFile, content: bytes, config: IngestConfig) -> ImageHeader:
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG with a preview or depth map appended
    animated = kind != "JPEG" and getattr(image, "is_animated", False)
    sixteen_bit = kind == "PNG" and content[24] == 16
    orientation = _orientation(image)
    flags = {"first_frame": animated, "turned": orientation in _TO_UPRIGHT, "sixteen_bit": sixteen_bit}
    keep = (
        config.skip_reencode
        and kind == ENCODED[config.encode_format]
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and not any(flags.values())
        and _ends_with_image(image, content)
    )
    return ImageHeader(
        format=kind,
        width=image.width,
        height=image.height,
        orientation=orientation,
        scans=content.count(b"\xff\xda") if image.info.get("progressive") else 1,
        keep=keep,
        flags=tuple(name for name, on in flags.items() if on),
    )


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF counts as no orientation
        return 1


def _ends_with_image(image: ImageFile.ImageFile, content: bytes) -> bool:
    """Whether nothing follows the end of the image."""
    if image.format == "PNG":
        return content.find(_IEND) == len(content) - len(_IEND)
    if image.format == "WEBP":
        return len(content) == 8 + int.from_bytes(content[4:8], "little")
    first_scan = image.fp.tell() if image.format == "JPEG" and image.fp else 0
    return content.find(b"\xff\xd9", first_scan) == len(content) - 2


def _check_limits(header: ImageHeader, config: IngestConfig) -> None:
    """Raises `FetchError` if the config excludes such an image, or decoding it would cost too much."""
    short, long = sorted((header.width, header.height))
    pixels, most = header.width * header.height, config.policy.max_pixels
    size = f"{header.width} x {header.height} px"
    if not pixels:
        raise FetchError("undecodable", size)
    if pixels > most:
        raise FetchError("too_many_pixels", f"{size}, more than {most} in all")
    if header.scans * pixels > MAX_SCANS * most:
        raise FetchError("too_many_pixels", f"{size} in {header.scans} scans")
    by_shorter_side = config.resize_mode in ("keep_ratio", "center_crop") and not config.resize_only_if_bigger
    if by_shorter_side and config.image_size**2 * long > most * short:
        raise FetchError("too_many_pixels", f"{size}, resized by its shorter side")
    if config.policy.animated == "refuse" and "first_frame" in header.flags:
        raise FetchError("animated", f"{header.format} of several frames")
    if short < config.min_image_size:
        raise FetchError("too_small", f"{size}, less than {config.min_image_size} px")
    if config.max_aspect_ratio and long > config.max_aspect_ratio * short:
        raise FetchError("aspect_ratio", f"{size}, more than {config.max_aspect_ratio} to 1")


def _decode(content: bytes) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None


def _decode_avif(content: bytes) -> np.ndarray | None:
    """Decodes with Pillow, because OpenCV returns 10-bit AVIF as if it had 16 bits."""
    try:
        with Image.open(io.BytesIO(content), formats=("AVIF",)) as image:
            pixels = np.asarray(image)
    except Exception:  # Pillow's plugins can raise anything on damaged bytes
        return None
    if pixels.ndim == 2:
        return pixels
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """BGRA -> BGR by img2dataset's formula, in blocks of rows: its floats take 75 bytes per pixel."""
    height, width = pixels.shape[:2]
    matted = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BLOCK_PX // width)
    for top in range(0, height, rows):
        block = pixels[top : top + rows]
        alpha = block[:, :, 3, np.newaxis]
        matted[top : top + rows] = np.rint((alpha / 255 * block[..., :3] + 255 - alpha).clip(min=0, max=255))
    return matted
