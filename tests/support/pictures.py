"""Images of every kind that the web has, good and bad, as bytes."""

import io
import struct
import zipfile
import zlib

import cv2
import numpy as np
from PIL import Image

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HTML = b"<!DOCTYPE html><html><head><title>404</title></head></html>"
PDF = b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n"


def pixels(width: int = 96, height: int = 64, seed: int = 0, cell: int = 8) -> np.ndarray:
    """(height, width, 3) RGB uint8: smooth colours, so that JPEG changes little."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 255, (-(-height // cell) + 1, -(-width // cell) + 1, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def image(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(width, height, seed))


def encode(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(width: int = 96, height: int = 64, seed: int = 0, **options) -> bytes:
    return encode(image(width, height, seed), "JPEG", **{"quality": 90, **options})


def with_alpha(width: int = 96, height: int = 64) -> Image.Image:
    picture = image(width, height).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((width, height)))
    return picture


def sixteen_bits(channels: int, width: int = 96, height: int = 64) -> bytes:
    """A PNG of 16 bits: grey, RGB, or RGBA with half of it transparent."""
    deep = pixels(width, height)[..., ::-1].astype(np.uint16) * 257
    deep = {1: deep[..., 0], 3: deep, 4: np.dstack([deep, np.full((height, width), 128 * 257, np.uint16)])}[channels]
    return cv2.imencode(".png", deep)[1].tobytes()


def turned(orientation: int, kind: str = "JPEG", **options) -> bytes:
    """An image that a viewer shows upright when it follows the EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    return encode(image() if back is None else image().transpose(back), kind, exif=exif, **options)


def animated(kind: str) -> bytes:
    """The picture, then a red and a blue frame."""
    frames = [image(), *(Image.new("RGB", (96, 64), colour) for colour in ("red", "blue"))]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def png_bomb(side: int = 16_000, depth: int = 1) -> bytes:
    """A black PNG of side x side pixels in a few kilobytes."""
    row = b"\0" * (1 + side * depth // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def scan_bomb(scans: int = 3000) -> bytes:
    """A progressive JPEG with one of its scans again and again."""
    plain = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    return plain[:last] + plain[last:-2] * scans + plain[-2:]


def with_zip_behind(content: bytes) -> bytes:
    """An image that is a ZIP too."""
    buffer = io.BytesIO(content)
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("payload.js", "alert(1)")
    assert zipfile.is_zipfile(buffer)
    return buffer.getvalue()


def exif_bomb() -> bytes:
    """A JPEG whose EXIF names the same 55,000 bytes as the text of each of 400 tags."""
    begin = 8 + 2 + 400 * 12 + 4
    entries = b"".join(struct.pack("<HHII", 0x9100 + tag, 2, 55_000, begin) for tag in range(400))
    tiff = b"II*\0" + struct.pack("<IH", 8, 400) + entries + struct.pack("<I", 0)
    return jpeg(exif=b"Exif\0\0" + tiff + b"a" * 55_000)
