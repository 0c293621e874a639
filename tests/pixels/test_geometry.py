"""Resizing against OpenCV; pasting against a loop over pixels and torchvision's numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mrcnn_jax.config.schema import Shrink
from mrcnn_jax.pixels.geometry import depth_in_image, paste, paste_region, resize
from mrcnn_jax.pixels.rle import PasteStyle, paste_rle
from mrcnn_jax.pixels.transforms import resize_image

RECORDED = (
    Path(__file__).parent.parent / "recorded" / "paste.npz"
)  # by tests/parity/record_paste.py
SIZE = (23, 31)
BOXES = [
    (3.0, 4.0, 17.0, 15.0),
    (2.3, 5.7, 29.6, 20.1),
    (-6.5, -3.2, 12.4, 9.9),  # beyond the image's top left
    (20.2, 11.1, 40.0, 33.3),  # beyond its bottom right
    (-5.0, -5.0, 50.0, 50.0),  # around the image
    (7.6, 8.6, 8.4, 9.4),  # holds no pixel centre
    (7.4, 8.4, 7.6, 8.6),  # smaller than a pixel, around a centre
    (9.0, 9.0, 9.0, 9.0),  # a point
    (40.0, 40.0, 50.0, 50.0),  # outside
]


def _paste_by_loop(mask: np.ndarray, box: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """Probabilities on the whole image, pixel by pixel; -1 where the pixel's centre is not in the
    box."""
    x1, y1, x2, y2 = box
    m = mask.shape[0]
    image = np.full(size, -1.0)
    for py in range(size[0]):
        for px in range(size[1]):
            if not (x1 <= px + 0.5 < x2 and y1 <= py + 0.5 < y2):
                continue
            u, v = (px + 0.5 - x1) / (x2 - x1) * m - 0.5, (py + 0.5 - y1) / (y2 - y1) * m - 0.5
            i, j = math.floor(v), math.floor(u)
            image[py, px] = sum(
                (1 - abs(v - a)) * (1 - abs(u - b)) * mask[a, b]
                for a in (i, i + 1)
                for b in (j, j + 1)
                if 0 <= a < m and 0 <= b < m
            )
    return image


def _whole(
    mask: np.ndarray,
    box: tuple[float, ...] | np.ndarray,
    size: tuple[int, int],
    style: PasteStyle = "exact",
    outside: float = 0.0,
) -> np.ndarray:
    """Probabilities on the whole image, `outside` where nothing was pasted."""
    region, (y0, x0) = paste(mask, np.array(box), size, style)
    image = np.full(size, outside, np.float32)
    image[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]] = region
    return image


@pytest.mark.parametrize("box", BOXES)
def test_paste_equals_a_loop_over_pixels(box: tuple[float, ...]) -> None:
    mask = np.random.default_rng(0).uniform(size=(7, 7)).astype(np.float32)
    np.testing.assert_allclose(
        _whole(mask, box, SIZE, outside=-1), _paste_by_loop(mask, box, SIZE), atol=1e-6
    )


def test_paste_equals_torchvisions_recorded_probabilities() -> None:
    recorded = np.load(RECORDED)
    pasted = recorded["pasted"]
    assert len(pasted) == 12
    for mask, box, expected in zip(recorded["masks"], recorded["boxes"], pasted, strict=True):
        size = expected.shape
        np.testing.assert_allclose(_whole(mask, box, size, "torchvision"), expected, atol=1e-5)
        near = np.abs(expected - 0.5) < 1e-5  # a rounding may decide there
        ours = coco_mask.decode(paste_rle(mask, box, size, "torchvision"))
        np.testing.assert_array_equal(ours[~near], (expected > 0.5)[~near])
        assert near.sum() <= 1


def test_torchvisions_boxes_are_whole_pixels() -> None:
    """By hand: 4 cells and 2 of border on a box of 8 px make 12 px, from 2 to 14, and pixel 14
    too."""
    image = _whole(
        np.ones((4, 4), np.float32), (4.0, 4.0, 12.0, 12.0), (20, 20), "torchvision", outside=-1
    )
    rows = np.flatnonzero((image >= 0).any(axis=1))
    assert (rows[0], rows[-1]) == (2, 14)
    # Pixel i of the 13 reads the 6 cells at (i + 0.5) / 13 * 6 - 0.5; the border's are 0.
    share = np.clip((np.arange(7) + 0.5) / 13 * 6 - 0.5, 0, 1)
    np.testing.assert_allclose(image[8, 2:9], share, atol=1e-6)
    np.testing.assert_allclose(image[8, 8:15], share[::-1], atol=1e-6)


def test_one_half_is_the_object_but_for_torchvision() -> None:
    mask = np.full((3, 3), 0.5, np.float32)
    areas = {
        style: coco_mask.area(paste_rle(mask, np.array([2.0, 2, 5, 5]), SIZE, style))
        for style in get_args(PasteStyle)
    }
    assert areas == {"exact": 9, "torchvision": 0}


@pytest.mark.parametrize(
    "box",
    [(3.0, 4.0, 17.0, 15.0), (0.0, 0.0, 28.0, 23.0), (4.4, 5.4, 20.6, 9.6), (7.4, 8.4, 7.6, 8.6)],
)
def test_a_mask_of_ones_fills_the_box(box: tuple[float, ...]) -> None:
    """Exactly the pixels with centres in the box, as long as its side is at most the mask's."""
    x, y = np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5
    inside = ((box[1] <= y) & (y < box[3]))[:, None] & ((box[0] <= x) & (x < box[2]))[None]
    np.testing.assert_array_equal(_whole(np.ones((28, 28), np.float32), box, SIZE) >= 0.5, inside)


def test_large_boxes_lose_their_corners_only() -> None:
    image = _whole(np.ones((28, 28), np.float32), (0, 0, 280, 280), (280, 280)) >= 0.5
    # A cell is 10 px: pixel i from the border takes .55 + .1 i of it, at most 1, and the corner the
    # product over both axes.
    share = np.minimum(0.55 + 0.1 * np.arange(140), 1)
    quarter = np.outer(share, share) >= 0.5
    assert (~quarter).sum() == 10
    np.testing.assert_array_equal(image[:140, :140], quarter)
    np.testing.assert_array_equal(image, image[::-1, ::-1])


@pytest.mark.parametrize("style", ["exact", "torchvision"])
def test_one_distance_stays_itself_within_a_refined_mask(style: Any) -> None:
    """The mask has four times the cells of the distances, so torchvision grows its box less."""
    masks, depth = np.full((1, 112, 112), 0.9, np.float32), np.full((1, 28, 28), 1.5, np.float32)
    box = np.array([[10, 20, 110.5, 120.25]], np.float32)
    whole, medians = depth_in_image(
        depth, masks, box, (1.0, 1.0), (200, 150), stride=4, style=style
    )
    region, (y, x) = paste_region(masks[0], box[0], (200, 150), style)
    known = np.zeros((200, 150), bool)
    known[y : y + region.shape[0], x : x + region.shape[1]] = region
    assert known.sum() > 9000
    np.testing.assert_allclose(whole[known], 1.5, rtol=1e-6)
    assert np.isnan(whole[~known]).all()
    np.testing.assert_allclose(medians, 1.5, rtol=1e-6)


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 90),
    st.floats(0.9, 1.1),
    st.integers(0, 999),
    st.sampled_from(get_args(Shrink)),
)
@settings(deadline=None, max_examples=120)
def test_resizing_is_opencvs(
    height: int, width: int, new_height: int, stretch: float, seed: int, shrink: Shrink
) -> None:
    """Both axes grow, or both shrink, as an image's do. Bilinear pixels are equal to the bit."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    new_width = max(1, round(width * new_height / height * stretch))
    new_width = min(new_width, width) if new_height < height else max(new_width, width)
    size = new_height, new_width
    ours, theirs = resize(image, size, shrink), resize_image(image, size, shrink)
    means = shrink == "area" and new_height < height
    assert np.abs(ours.astype(int) - theirs).max(initial=0) <= (1 if means else 0)
