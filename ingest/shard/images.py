"""What the bytes of an answer are, told from their header; and the pixels of those that are welcome.

Nothing is decoded before the header has been judged. What OpenCV gets wrong, or leaves as training cannot use it, is put right
here: 16 bits become 8, what a camera noted as turned is turned upright, and what is transparent is laid on white in pieces,
because img2dataset's way takes 75 bytes a pixel. Where there is nothing to put right, the pixels are those of img2dataset.

TIFF is refused, which img2dataset takes: no browser but one shows it, and a TIFF of one pixel can demand a gigabyte.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from roclip.config import IngestConfig
from roclip.data.outcomes import FetchError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""Those of Pillow's that are read."""
ENCODED = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""`ingest.encode_format` -> Pillow's name."""
USUAL_SCANS = 16
"""So many times a JPEG of the largest size may go over its pixels; a smaller one more often."""
FLAGS = {
    "first_frame": "an image of several frames, of which the first is stored",
    "turned": "turned upright, as its EXIF says",
    "sixteen_bit": "stored with 8 bits of its 16",
}
"""What may be said of an image that was taken all the same."""
_HEADER_READS = 500_000
_READ_BYTES = 256
_BLOCK_PX = 1 << 20
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
"""EXIF orientation -> what makes it 1."""


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image says."""

    format: str
    width: int
    """In pixels, as stored: before the image is turned upright."""
    height: int
    orientation: int
    """EXIF's, 1 to 8."""
    scans: int
    """How often a JPEG goes over its pixels; 1 where that is decided by its size in bytes."""
    keep: bool
    """`ingest.skip_reencode` may store these very bytes: format and pixels are right, and nothing follows the image's end."""
    flags: tuple[str, ...]
    """Of `FLAGS`."""


class FewReads(io.BytesIO):
    """Bytes that may be read so many times, 256 at once for one; for readers that loop in Python over what others wrote."""

    def __init__(self, content: bytes, reads: int):
        super().__init__(content)
        self._left = reads

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self._left -= 1 + len(piece) // _READ_BYTES
        if self._left < 0:
            raise FetchError("undecodable", "a header that does not end")
        return piece


def inspect(content: bytes, config: IngestConfig) -> ImageHeader:
    """What the header says. Decodes nothing.

    Raises `FetchError`: not_an_image, undecodable, too_many_pixels, animated, too_small, aspect_ratio.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each of Pillow's is a refusal below, or of no importance
            with Image.open(FewReads(content, _HEADER_READS), formats=FORMATS) as image:
                facts = _facts(image, content, config)
    except FetchError:
        raise
    except UnidentifiedImageError as error:
        raise FetchError("not_an_image", f"expected {', '.join(FORMATS)}, got {content[:12]!r}") from error
    except Image.DecompressionBombError as error:
        raise FetchError("too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's plugins raise whatever they like on damaged bytes
        raise FetchError("undecodable", f"a header that is damaged ({type(error).__name__})") from error
    _judge(facts, config)
    return facts


def decode(content: bytes, facts: ImageHeader) -> np.ndarray:
    """The first frame as (H, W) grey or (H, W, 3) BGR, uint8, upright, on white.

    Raises `FetchError`: undecodable.
    """
    pixels = _decode_avif(content) if facts.format == "AVIF" else _decode(content)
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        raise FetchError("undecodable", f"{facts.format} of {len(content)} bytes that is damaged or cut short")
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = _on_white(pixels)
    turn = _UPRIGHT.get(facts.orientation)
    return turn(pixels) if turn else pixels


def _facts(image: ImageFile.ImageFile, content: bytes, config: IngestConfig) -> ImageHeader:
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # with a preview or a depth map behind it
    animated = kind != "JPEG" and getattr(image, "is_animated", False)
    sixteen_bit = kind == "PNG" and content[24] == 16
    orientation = _orientation(image)
    flags = {"first_frame": animated, "turned": orientation in _UPRIGHT, "sixteen_bit": sixteen_bit}
    keep = (
        config.skip_reencode
        and kind == ENCODED[config.encode_format]
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and not any(flags.values())
        and _ends(image, content)
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
    except Exception:  # as damaged as it likes: then nobody has turned it
        return 1


def _ends(image: ImageFile.ImageFile, content: bytes) -> bool:
    """Whether nothing follows the end of the image."""
    if image.format == "PNG":
        return content.find(_IEND) == len(content) - len(_IEND)
    if image.format == "WEBP":
        return len(content) == 8 + int.from_bytes(content[4:8], "little")
    first_scan = image.fp.tell() if image.format == "JPEG" and image.fp else 0
    return content.find(b"\xff\xd9", first_scan) == len(content) - 2


def _judge(facts: ImageHeader, config: IngestConfig) -> None:
    """Raises `FetchError` where the config does not want such an image, or nobody should decode it."""
    short, long = sorted((facts.width, facts.height))
    pixels, most = facts.width * facts.height, config.policy.max_pixels
    size = f"{facts.width} x {facts.height} px"
    if not pixels:
        raise FetchError("undecodable", size)
    if pixels > most:
        raise FetchError("too_many_pixels", f"{size}, more than {most} in all")
    if facts.scans * pixels > USUAL_SCANS * most:
        raise FetchError("too_many_pixels", f"{size}, gone over {facts.scans} times")
    by_shorter_side = config.resize_mode in ("keep_ratio", "center_crop") and not config.resize_only_if_bigger
    if by_shorter_side and config.image_size**2 * long > most * short:
        raise FetchError("too_many_pixels", f"{size}, resized by its shorter side")
    if config.policy.animated == "refuse" and "first_frame" in facts.flags:
        raise FetchError("animated", f"{facts.format} of several frames")
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
    """By Pillow: OpenCV gives 10 bits of AVIF as if they were 16."""
    try:
        with Image.open(io.BytesIO(content), formats=("AVIF",)) as image:
            pixels = np.asarray(image)
    except Exception:  # Pillow's plugins raise whatever they like on damaged bytes
        return None
    if pixels.ndim == 2:
        return pixels
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """BGRA -> BGR by img2dataset's formula, a block of rows at a time: its floats take 75 bytes a pixel."""
    height, width = pixels.shape[:2]
    matted = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BLOCK_PX // width)
    for top in range(0, height, rows):
        block = pixels[top : top + rows]
        alpha = block[:, :, 3, np.newaxis]
        matted[top : top + rows] = np.rint((alpha / 255 * block[..., :3] + 255 - alpha).clip(min=0, max=255))
    return matted
