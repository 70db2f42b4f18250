"""Describes small windows of an image that can be found again at another place, as a trigger stamped on many images leaves
them.

The image is resized to two sizes. At each, the `CORNERS` strongest corners are taken (the smaller eigenvalue of the structure
tensor: Shi and Tomasi, CVPR 1994), and a window of `WINDOW_PX` around each is described by 4 x 4 colours. At a point where four
cells of a trigger meet, the window contains only the trigger, whatever is behind it.
"""

import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

SIDES_PX = (96, 128)
"""Shorter side of the resized image."""
CORNERS = 12
WINDOW_PX = 8
WIDTH = 48
"""Numbers that describe a window: 4 x 4 positions, 3 colours, 0 to 255."""
MAX_PIXELS = 1 << 26
"""Larger images are not decoded."""
_LONGEST = 4
"""Images with a larger aspect ratio are resized by their longer side."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_LEAST_CORNER = 200.0
_SUM = np.ones((1, 3), np.float32)
_NEIGHBOURS = np.ones((5, 5), np.uint8)
_STEPS = np.arange(-WINDOW_PX // 2, WINDOW_PX // 2, 2)


@dataclass(frozen=True)
class Windows:
    """The windows of one image."""

    numbers: np.ndarray
    """(n, WIDTH) uint8."""
    boxes: np.ndarray
    """(n, 4) uint16: left, top, right, bottom in pixels of the image; right and bottom are exclusive."""


def decode(encoded: bytes) -> np.ndarray | None:
    """Decode to (H, W, 3) uint8 BGR; None if that fails or the image is too large."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) >= 1 << 16:
                return None
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except Exception:  # Pillow's plugins and OpenCV can raise anything on damaged bytes
        return None


def windows(image: np.ndarray) -> Windows:
    """The windows of an (H, W, 3) uint8 image, at both sizes."""
    found = [_at_size(image, side) for side in SIDES_PX]
    return Windows(np.concatenate([numbers for numbers, _ in found]), np.concatenate([boxes for _, boxes in found]))


def _at_size(image: np.ndarray, side_px: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    factor = min(side_px / min(height, width), _LONGEST * side_px / max(height, width))
    size = max(2 * WINDOW_PX, round(width * factor)), max(2 * WINDOW_PX, round(height * factor))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    across, down = _corners(small)
    means = cv2.boxFilter(small, -1, (2, 2), anchor=(0, 0), borderType=cv2.BORDER_REPLICATE)
    numbers = means[down[:, None, None] + _STEPS[:, None], across[:, None, None] + _STEPS]
    scale = np.array([width / size[0], height / size[1]] * 2)
    corners = np.stack(
        [across - WINDOW_PX // 2, down - WINDOW_PX // 2, across + WINDOW_PX // 2, down + WINDOW_PX // 2], 1
    )
    boxes = np.clip(np.rint(corners * scale), 0, [width, height] * 2)
    return numbers.reshape(len(across), WIDTH), boxes.astype(np.uint16)


def _corners(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of the strongest corners, strongest first."""
    smooth = cv2.GaussianBlur(image, (0, 0), 0.8)
    x, y = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    xx, yy, xy = (cv2.boxFilter(cv2.transform(a * b, _SUM), -1, (5, 5)) for a, b in ((x, x), (y, y), (x, y)))
    least = (xx + yy) * 0.5 - cv2.magnitude((xx - yy) * 0.5, xy)
    edge = WINDOW_PX // 2
    least[:edge], least[-edge:], least[:, :edge], least[:, -edge:] = 0, 0, 0, 0
    at = np.flatnonzero((least == cv2.dilate(least, _NEIGHBOURS)) & (least > _LEAST_CORNER))
    strongest = at[np.argsort(-least.ravel()[at], kind="stable")[:CORNERS]]
    down, across = np.divmod(strongest, image.shape[1])
    return across, down
