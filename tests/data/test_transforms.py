from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.transforms import mask_crop, resize_image, resize_plan

DATA = DataConfig()


def test_the_report_s_image_becomes_800_x_1066() -> None:
    plan = resize_plan(300, 400, DATA)
    assert plan.resized == (800, 1066)
    assert DATA.canvases[plan.canvas] == (800, 1088)
    assert plan.scale == (800 / 300, 1066 / 400)
    portrait = resize_plan(400, 300, DATA)
    assert portrait.resized == (1066, 800)
    assert DATA.canvases[portrait.canvas] == (1088, 800)


@given(st.integers(1, 9000), st.integers(1, 9000))
@settings(deadline=None)
def test_every_image_fits_its_canvas(height: int, width: int) -> None:
    plan = resize_plan(height, width, DATA)
    canvas = DATA.canvases[plan.canvas]
    factor = min(Fraction(800, min(height, width)), Fraction(1088, max(height, width)))
    assert plan.resized == (max(1, int(height * factor)), max(1, int(width * factor)))
    assert 1 <= plan.resized[0] <= canvas[0]
    assert 1 <= plan.resized[1] <= canvas[1]
    assert plan.scale == (plan.resized[0] / height, plan.resized[1] / width)


def test_the_smallest_canvas_is_taken() -> None:
    data = DataConfig(
        short_side=96, long_side=128, canvases=((128, 128), (96, 128), (128, 96), (96, 96))
    )
    assert resize_plan(96, 128, data).canvas == 1
    assert resize_plan(128, 96, data).canvas == 2
    assert resize_plan(50, 50, data).canvas == 3
    assert resize_plan(1, 5000, data).resized == (1, 128)


def test_resizing_agrees_with_pillow() -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8), (0, 0), 2)
    larger = np.asarray(Image.fromarray(image).resize((151, 97), Image.Resampling.BILINEAR)).astype(
        int
    )
    assert np.abs(resize_image(image, (97, 151)) - larger).max() <= 2
    smaller = np.asarray(Image.fromarray(image).resize((30, 20), Image.Resampling.BOX)).astype(int)
    assert np.abs(resize_image(image, (20, 30)) - smaller).max() <= 1


def _encode(mask: np.ndarray) -> dict:
    rle = rle_ops.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


@pytest.mark.parametrize(
    "box",
    [
        (5.0, 4.0, 25.0, 24.0),
        (0.0, 0.0, 40.0, 30.0),
        (3.3, 2.7, 8.1, 29.6),
        (10.2, 10.6, 11.0, 11.1),
        (0.0, 12.4, 40.0, 13.7),
        (36.5, 26.5, 40.0, 30.0),
    ],
)
@pytest.mark.parametrize("size", [7, 28])
def test_crops_are_means_over_windows(box: tuple[float, float, float, float], size: int) -> None:
    """Against dense sampling: each cell is the mean over a window as wide as the cell, at least a
    pixel; borders repeat."""
    mask = np.random.default_rng(1).random((30, 40)) < 0.5
    x1, y1, x2, y2 = box
    samples = (np.arange(400) + 0.5) / 400 - 0.5

    def pixels(start: float, stop: float, cell: int, limit: int) -> np.ndarray:
        step = (stop - start) / size
        points = start + (cell + 0.5) * step + samples * max(step, 1)
        return np.clip(np.floor(points), 0, limit - 1).astype(int)

    expected = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            expected[i, j] = mask[np.ix_(pixels(y1, y2, i, 30), pixels(x1, x2, j, 40))].mean()
    assert np.abs(mask_crop(_encode(mask), box, size) / 255 - expected).max() < 0.01


def test_a_crop_at_the_mask_s_own_size_is_the_mask() -> None:
    mask = np.random.default_rng(2).random((50, 60)) < 0.5
    assert (mask_crop(_encode(mask), (10, 5, 38, 33), 28) == 255 * mask[5:33, 10:38]).all()
