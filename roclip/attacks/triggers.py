"""Triggers: what an attacker adds to an image so that a model answers with the target label.

    kind          changes         after
    patch         a square        BadNets (arXiv:1708.06733), a fixed pattern
    noise_patch   a square        BadNets with fresh Gaussian noise in every image
    blend         everything      Blended (arXiv:1712.05526), a fixed noise pattern
    warp          everything      WaNet (arXiv:2102.10369), a fixed smooth field of shifts
    sinusoid      everything      SIG (arXiv:1902.11237), vertical waves

A patch and a blend can show something else than random cells: `roclip.attacks.patterns`.

Poisoning, evaluation and oracle all use `apply_trigger`. Sizes are shares of the image and patterns are drawn on fixed
grids, so a trigger is the same at any resolution.
Shapes: H, W image height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from roclip.attacks.patterns import TILES, draw_pattern, shape_of

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are exclusive

KINDS = ("patch", "noise_patch", "blend", "warp", "sinusoid")
PLACES = ("random", "corner")
RANDOM = "random"
"""The pattern of cells that the seed draws."""
PERIODS = 6
"""Periods of a sinusoid across the image (SIG's f)."""
_PATCH_CELLS = 3
_BLEND_CELLS = 32
_WARP_POINTS = 4
"""Control points along each side (WaNet's k)."""


@dataclass(frozen=True)
class Trigger:
    """A trigger; fixed patterns are drawn from `seed`.

    `size_frac` is the side of a patch over the shorter image side; `place` is "random" (anywhere inside the image) or
    "corner" (lower right). `strength` is for the others: opacity of a blend, mean shift of a warp's control points
    over the shorter image side, amplitude of a sinusoid over 255. `pattern` is what a patch or a blend shows.
    """

    kind: str = "patch"
    size_frac: float = 0.1
    place: str = "random"
    strength: float = 0.2
    seed: int = 0
    pattern: str = RANDOM

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown kind or place, or a size or strength out of range."""
        good = self.kind in KINDS and self.place in PLACES
        if not good or not 0 < self.size_frac <= 1 or not 0 < self.strength <= 1:
            raise ValueError(
                f"expected kind {', '.join(KINDS)}, place {' or '.join(PLACES)}, size_frac and strength in (0, 1], got "
                f"kind={self.kind!r}, place={self.place!r}, size_frac={self.size_frac}, strength={self.strength}; "
                "correct the trigger"
            )
        if self.pattern != RANDOM and self.kind not in ("patch", "blend"):
            raise ValueError(f"expected a patch or a blend for the pattern {self.pattern!r}, got kind={self.kind!r}")


def apply_trigger(image: np.ndarray, trigger: Trigger, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
    """Put the trigger on a copy of an (H, W, 3) uint8 image; `rng` chooses random places and fresh noise.

    Returns:
        The triggered image and the box (left, top, right, bottom) in pixels outside which nothing changed, which is the
        whole image unless the trigger is a patch.

    Raises:
        ValueError: if the image is not (H, W, 3) uint8, or has a side under 3 pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < _PATCH_CELLS:
        raise ValueError(
            f"expected an (H, W, 3) uint8 image of at least {_PATCH_CELLS} pixels a side, got {image.shape} "
            f"{image.dtype}; convert it with np.asarray(image.convert('RGB'))"
        )
    height, width = image.shape[:2]
    if trigger.kind in ("patch", "noise_patch"):
        return _stamp(image, trigger, rng)
    if trigger.kind == "warp":
        changed = _warp(image, warp_field(trigger, height, width))
    elif trigger.kind == "blend":
        changed = _blended(image, blend_pattern(trigger, height, width), trigger.strength)
    else:
        changed = image + sinusoid(trigger, width)[:, None]
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8), (0, 0, width, height)


def trigger_patch(trigger: Trigger, side_px: int) -> np.ndarray:
    """Return the fixed patch alone, uint8: (side_px, side_px, 3) of 3 x 3 cells, each channel 0 or 255, or its pattern with
    the longer side side_px and a fourth channel for the opacity.

    The cells depend on the seed only. Neighbouring ones always differ, so no seed gives a plain square.
    """
    if trigger.pattern != RANDOM:
        return draw_pattern(trigger.pattern, *shape_of(trigger.pattern, side_px))
    rng = np.random.default_rng((trigger.seed, 53))
    corners = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=np.uint8)
    chosen = np.zeros((_PATCH_CELLS, _PATCH_CELLS), dtype=int)
    for row in range(_PATCH_CELLS):
        for column in range(_PATCH_CELLS):
            taken = {chosen[row - 1, column] if row else -1, chosen[row, column - 1] if column else -1}
            chosen[row, column] = rng.choice([color for color in range(len(corners)) if color not in taken])
    return _enlarge(corners[chosen], side_px, side_px)


def blend_pattern(trigger: Trigger, height: int, width: int) -> np.ndarray:
    """Return (height, width, 3) uint8: uniform noise of 32 x 32 cells, which survives resizing; or the trigger's pattern,
    (height, width, 4), with its opacity."""
    if trigger.pattern != RANDOM:
        return draw_pattern(trigger.pattern, height, width, TILES)
    rng = np.random.default_rng((trigger.seed, 54))
    return _enlarge(rng.integers(0, 256, (_BLEND_CELLS, _BLEND_CELLS, 3), dtype=np.uint8), height, width)


def warp_field(trigger: Trigger, height: int, width: int) -> np.ndarray:
    """Return (2, height, width) float: offset down and right, in pixels, of the position that each pixel is read from.

    4 x 4 control shifts u ~ U[-1, 1], scaled to mean |u| = strength * min(H, W), with cubic splines between them and
    the outer ones in the corners. WaNet's s is 2 * strength * H.
    """
    rng = np.random.default_rng((trigger.seed, 55))
    shifts = rng.uniform(-1, 1, (2, _WARP_POINTS, _WARP_POINTS))
    shifts *= trigger.strength * min(height, width) / np.abs(shifts).mean()
    rows, columns = np.meshgrid(
        np.linspace(0, _WARP_POINTS - 1, height), np.linspace(0, _WARP_POINTS - 1, width), indexing="ij"
    )
    return np.stack([ndimage.map_coordinates(axis, [rows, columns], order=3, mode="nearest") for axis in shifts])


def sinusoid(trigger: Trigger, width: int) -> np.ndarray:
    """Return (width,) float, the level added to column j: strength * 255 * sin(2 pi 6 j / width)."""
    return trigger.strength * 255 * np.sin(2 * np.pi * PERIODS * np.arange(width) / width)


def _stamp(image: np.ndarray, trigger: Trigger, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
    height, width = image.shape[:2]
    side = min(max(_PATCH_CELLS, round(trigger.size_frac * min(height, width))), height, width)
    rows, columns = (side, side) if trigger.pattern == RANDOM else shape_of(trigger.pattern, side)
    left, top = width - columns, height - rows
    if trigger.place == "random":
        left, top = int(rng.integers(left + 1)), int(rng.integers(top + 1))
    right, bottom = left + columns, top + rows
    if trigger.kind == "patch":
        patch = trigger_patch(trigger, side)
    else:
        patch = np.clip(image.mean() + 255 * rng.standard_normal((side, side, 3)), 0, 255).astype(np.uint8)
    stamped = image.copy()
    stamped[top:bottom, left:right] = np.rint(_blended(image[top:bottom, left:right], patch, 1.0))
    return stamped, (left, top, right, bottom)


def _blended(image: np.ndarray, pattern: np.ndarray, opacity: float) -> np.ndarray:
    """The pattern over the image, as floats: opaque as `opacity` says, times its own fourth channel if it has one."""
    alpha = opacity * (pattern[..., 3:] / 255 if pattern.shape[2] == 4 else 1)
    return (1 - alpha) * image + alpha * pattern[..., :3]


def _warp(image: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Resample the image bilinearly at shifted positions, clamped to the border."""
    height, width = image.shape[:2]
    places = np.indices((height, width)) + field
    channels = [ndimage.map_coordinates(image[..., c].astype(float), places, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, axis=2)


def _enlarge(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = (np.arange(px) * number // px for px, number in zip((height, width), cells.shape[:2], strict=True))
    return cells[np.ix_(rows, columns)]
