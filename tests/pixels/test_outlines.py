"""Outlines of masks against their pixels, as two other libraries fill them."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from mrcnn_jax.pixels.outlines import STRAY, filled, joined, outlines, signed_area

ROWS, COLUMNS = np.mgrid[:60, :80]


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(COLUMNS + 0.5 - x, ROWS + 0.5 - y) <= radius


def block(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    return (x1 <= COLUMNS) & (x2 > COLUMNS) & (y1 <= ROWS) & (y2 > ROWS)


RNG = np.random.default_rng(0)
NOISE = cv2.GaussianBlur(RNG.normal(size=(60, 80)), (0, 0), 3) > 0.02
MASKS = {
    "disc": disc(40, 30, 22.5),
    "at the border": disc(0, 0, 30) | disc(80, 60, 20),
    "thin": np.abs(COLUMNS - 1.3 * ROWS) < 1,
    "all": np.ones((60, 80), bool),
    "a pixel": block(79, 59, 80, 60),
    "holes": disc(40, 30, 25) & ~disc(35, 30, 6) & ~disc(50, 28, 4) | block(34, 29, 37, 31),
    "a bump": block(10, 10, 14, 11) | block(12, 11, 13, 12),  # which smoothing would flatten
    "diagonal": block(3, 3, 5, 5) | block(5, 5, 7, 7),
    "random": RNG.random((60, 80)) < 0.5,
    "blobs": NOISE,
}


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_filled_again_they_give_the_mask(mask: np.ndarray) -> None:
    """Also as one polygon, by COCO's rule; and by Pillow's where it has no seams."""
    loops = outlines(mask)
    at_once = np.zeros(mask.shape, bool)
    for rle in coco_mask.frPyObjects([loop.ravel().tolist() for loop in loops], *mask.shape):
        at_once ^= coco_mask.decode(rle).astype(bool)
    np.testing.assert_array_equal(filled(loops, mask.shape), at_once)  # type: ignore[arg-type]
    assert overlap(filled(loops, mask.shape), mask) >= 0.98  # type: ignore[arg-type]
    whole = coco_mask.frPyObjects([joined(loops).ravel().tolist()], *mask.shape)
    assert overlap(coco_mask.decode(whole)[..., 0].astype(bool), mask) >= 0.97
    assert all(loop.min() >= 0 and (loop.max(0) <= (80, 60)).all() for loop in loops)


def test_parts_and_holes_are_told_apart() -> None:
    def areas(name: str) -> list[float]:
        return [signed_area(loop) for loop in outlines(MASKS[name])]

    assert areas("all") == [4800]
    assert areas("a pixel") == [1]
    assert areas("diagonal") == [4, 4]
    ring, hole, second, island = areas("holes")
    assert ring == pytest.approx(np.pi * 25**2, rel=0.01)
    assert hole == pytest.approx(-np.pi * 6**2, rel=0.03)
    assert second == pytest.approx(-np.pi * 4**2, rel=0.05)
    assert island == 6
    count, _ = cv2.connectedComponents(MASKS["random"].astype(np.uint8), connectivity=4)
    assert sum(area > 0 for area in areas("random")) == count - 1
    empty = np.zeros((60, 80), bool)
    assert outlines(empty) == []


def test_an_outline_has_few_points_and_is_not_shifted() -> None:
    """Of a disc about as many as a circle needs, all within STRAY of it; of a rectangle four."""
    (loop,) = outlines(MASKS["disc"])
    assert len(loop) <= 40
    assert np.abs(np.hypot(*(loop - (40, 30)).T) - 22.5).max() <= 0.5 + STRAY
    assert loop.mean(0) == pytest.approx((40, 30), abs=0.5)
    image = Image.new("1", (80, 60))
    ImageDraw.Draw(image).polygon([tuple(point) for point in (loop - 0.5).tolist()], fill=1)
    assert overlap(np.asarray(image), MASKS["disc"]) >= 0.95
    (loop,) = outlines(block(10, 20, 40, 50))
    assert sorted(loop.tolist()) == [[10, 20], [10, 50], [40, 20], [40, 50]]


def test_long_outlines_are_joined_in_little_memory() -> None:
    """By the shortest seam: of two circles, between the points that face each other."""
    angles = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    circle = 1000 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    tracemalloc.start()
    try:
        whole = joined([circle, circle + np.array([5000, 0])])
        assert tracemalloc.get_traced_memory()[1] < 5e6  # all pairs are 144 MB
    finally:
        tracemalloc.stop()
    assert len(whole) == 6002
    seams = np.flatnonzero(np.hypot(*np.diff(whole, axis=0).T) > 100)
    assert np.abs(whole[seams[0]] - (1000, 0)).max() < 1e-6
    assert np.abs(whole[seams[0] + 1] - (4000, 0)).max() < 1e-6
    assert len(seams) == 2
