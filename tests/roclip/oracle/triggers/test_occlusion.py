"""Hiding an image piece by piece, with models whose reasons are known."""

import numpy as np
import pytest

from roclip.oracle.triggers.occlusion import find_spots

SIDE, PATCH = 48, 6


def white_square(x: int, y: int) -> np.ndarray:
    image = np.random.default_rng(x + SIDE * y).integers(60, 100, (SIDE, SIDE, 3), dtype=np.uint8)
    image[y : y + PATCH, x : x + PATCH] = 255
    return image


class Model:
    """Says label 1 of an image in which at least so many pixels are white; counts what it is shown."""

    def __init__(self, pixels: int):
        self.pixels, self.shown = pixels, 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.shown += len(images)
        white = (images[..., 0] == 255).sum(axis=(1, 2))
        return np.stack([np.full(len(images), self.pixels - 0.5), white], axis=1).astype(np.float32)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (20, 9), (42, 42), (3, 30)])
def test_place_that_the_answer_hangs_on_is_found(x: int, y: int):
    model = Model(PATCH**2)
    (spot,) = find_spots(white_square(x, y)[None], 1, model)
    assert spot is not None
    assert spot.window_px == 8
    assert abs(spot.centre[0] - (x + PATCH / 2)) <= 4
    assert abs(spot.centre[1] - (y + PATCH / 2)) <= 4
    assert model.shown <= 1 + 2 * 25


@pytest.mark.parametrize(
    ("pixels", "image"),
    [(0, white_square(20, 20)), (SIDE**2 // 2, np.full((SIDE, SIDE, 3), 255, np.uint8))],
    ids=["no window changes it", "the fill is white as well"],
)
def test_answer_that_hangs_on_no_window_has_no_spot_and_costs_one_scan(pixels: int, image: np.ndarray):
    model = Model(pixels)
    assert find_spots(image[None], 1, model) == [None]
    assert model.shown == 1 + 25


def test_answer_that_hangs_on_every_window_has_no_spot():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:: SIDE // 12, :: SIDE // 12] = 255  # everywhere, and each point counts
    assert find_spots(image[None], 1, Model((SIDE // (SIDE // 12)) ** 2)) == [None]


def test_each_image_has_its_own():
    one, none, other = find_spots(
        np.stack([white_square(4, 4), np.zeros((SIDE, SIDE, 3), np.uint8), white_square(30, 36)]), 1, Model(PATCH**2)
    )
    assert none is None
    assert one is not None
    assert other is not None
    assert one.centre < other.centre
