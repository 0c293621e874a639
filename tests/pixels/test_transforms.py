from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import get_args

import cv2
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import DataConfig, Shrink
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.ops.masks import crop_targets
from mrcnn_jax.pixels.transforms import Transform, coverage, plan_for, resize_image

DATA = DataConfig()
SIZE = 28


def test_the_report_s_image_becomes_800_x_1066() -> None:
    plan = plan_for(300, 400, DATA)
    assert plan.resized == (800, 1066)
    assert DATA.canvases[plan.canvas] == (800, 1088)
    assert plan.scale == (800 / 300, 1066 / 400)
    portrait = plan_for(400, 300, DATA)
    assert portrait.resized == (1066, 800)
    assert DATA.canvases[portrait.canvas] == (1088, 800)


@given(st.integers(1, 9000), st.integers(1, 9000))
@settings(deadline=None)
def test_every_image_fits_its_canvas(height: int, width: int) -> None:
    plan = plan_for(height, width, DATA)
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
    assert plan_for(96, 128, data).canvas == 1
    assert plan_for(128, 96, data).canvas == 2
    assert plan_for(50, 50, data).canvas == 3
    assert plan_for(1, 5000, data).resized == (1, 128)


def test_resizing_agrees_with_pillow() -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8), (0, 0), 2)
    larger = np.asarray(Image.fromarray(image).resize((151, 97), Image.Resampling.BILINEAR)).astype(
        int
    )
    assert np.abs(resize_image(image, (97, 151), "area") - larger).max() <= 2
    smaller = np.asarray(Image.fromarray(image).resize((30, 20), Image.Resampling.BOX)).astype(int)
    assert np.abs(resize_image(image, (20, 30), "area") - smaller).max() <= 1


def test_bilinear_shrinking_looks_at_the_nearest_pixels_alone() -> None:
    """Centres of thirds lie on pixels, of halves between two; elsewhere the formula in floats."""
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    third = resize_image(image, (20, 30), "bilinear")
    np.testing.assert_array_equal(third, image[1::3, 1::3])
    half = image.reshape(30, 2, 45, 2, 3).mean((1, 3))
    assert np.abs(resize_image(image, (30, 45), "bilinear") - half).max() <= 0.5
    expected: np.ndarray = image.astype(float)
    for axis, cells in enumerate((23, 41)):
        length = image.shape[axis]
        places = (np.arange(cells) + 0.5) * length / cells - 0.5
        weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(length)))
        expected = np.moveaxis(np.tensordot(weights, expected, (1, axis)), 0, axis)
    found = resize_image(image, (23, 41), "bilinear")
    assert np.abs(found - expected).max() < 0.8  # rounded, and computed in fixed point
    assert np.abs(resize_image(image, (23, 41), "area") - expected).max() > 40
    for shrink in get_args(Shrink):
        np.testing.assert_array_equal(
            resize_image(image, (61, 90), shrink), resize_image(image, (61, 90), "area")
        )


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
    """Against dense sampling: a cell is the mean over a window of its width, at least a pixel;
    borders repeat."""
    mask = np.random.default_rng(1).random((30, 40)) < 0.5
    x1, y1, x2, y2 = box
    samples = (np.arange(400) + 0.5) / 400 - 0.5

    def shares(start: float, stop: float, limit: int) -> np.ndarray:
        """[cell, pixel]: the share of a cell's samples that lie in a pixel."""
        step = (stop - start) / size
        found = []
        for cell in range(size):
            points = start + (cell + 0.5) * step + samples * max(step, 1)
            pixels = np.clip(np.floor(points), 0, limit - 1).astype(int)
            found.append(np.bincount(pixels, minlength=limit) / len(samples))
        return np.array(found)

    expected = shares(y1, y2, 30) @ mask @ shares(x1, x2, 40).T
    assert np.abs(coverage(mask, box, size) / 255 - expected).max() < 0.01


def test_a_crop_at_the_mask_s_own_size_is_the_mask() -> None:
    mask = np.random.default_rng(2).random((50, 60)) < 0.5
    assert (coverage(mask, (10, 5, 38, 33), 28) == 255 * mask[5:33, 10:38]).all()


# -- targets made from crops, against full masks: measured on real objects ------------------------


def _from_full_mask(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The mask inside the box, resized bilinearly to 28 x 28 and cut at .5."""

    def down(rows: np.ndarray, start: float, stop: float) -> np.ndarray:
        position = np.clip(
            start + (np.arange(SIZE) + 0.5) / SIZE * (stop - start) - 0.5, 0, len(rows) - 1
        )
        first = np.floor(position).astype(int)
        second = np.minimum(first + 1, len(rows) - 1)
        weight = (position - first)[:, None]
        return (1 - weight) * rows[first] + weight * rows[second]

    x1, y1, x2, y2 = box.astype(np.float64)
    return down(down(mask, y1, y2).T, x1, x2).T >= 0.5


@pytest.fixture(scope="module")
def objects(data_folder: Path) -> list[tuple[np.ndarray, tuple[float, ...], np.ndarray]]:
    """Full mask, box and crop of the training objects of coco300."""
    root = data_folder / "coco300"
    dataset = read_coco(
        root / "annotations" / "instances_train.json", root / "images", DataConfig()
    )
    records = [
        record
        for image in dataset.images
        for record in image.annotations
        if record.rle and not record.iscrowd
    ]
    return [
        (mask := rle_ops.decode(record.rle), record.box, coverage(mask, record.box, 112))
        for record in records
    ]


@pytest.mark.data
@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.2])
def test_targets_from_crops_are_those_from_full_masks(objects: list[tuple], jitter: float) -> None:
    masks, truth, crops = zip(*objects, strict=True)
    truth = np.array(truth, np.float32)
    sides = np.tile(truth[:, 2:] - truth[:, :2], 2)
    boxes = truth + (jitter * np.random.default_rng(0).uniform(-1, 1, truth.shape) * sides).astype(
        np.float32
    )
    boxes = np.clip(boxes, 0, np.array([mask.shape[::-1] * 2 for mask in masks], np.float32))
    rows = np.arange(len(masks), dtype=np.int32)
    cut = (
        np.asarray(
            jax.jit(crop_targets, static_argnames="size")(
                np.stack(crops), truth, rows, boxes, size=SIZE
            )
        )
        > 0
    )
    full = np.stack([_from_full_mask(mask, box) for mask, box in zip(masks, boxes, strict=True)])
    union = (cut | full).sum((1, 2))
    iou = np.where(union > 0, (cut & full).sum((1, 2)) / np.maximum(union, 1), 1)
    bias = cut.sum() / full.sum() - 1
    print(
        f"\njitter {jitter}: {len(masks)} objects, mean IoU {iou.mean():.4f}, "
        f"smallest {iou.min():.3f}, area {bias:+.2%}"
    )
    assert len(masks) > 1400
    assert iou.mean() >= 0.95
    assert iou.min() > 0.8
    assert abs(bias) <= 0.01


def test_a_transform_that_begins_outside_of_its_image_fills_with_zeros() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    transform = Transform((3, 4), (3, 4), (5, 6), offset=(-1, -2))
    expected = np.zeros((5, 6), np.uint8)
    expected[1:4, 2:6] = image
    assert (transform.pixels(image) == expected).all()
    assert transform.boxes(np.array([[1, 0, 4, 3]], np.float32)).tolist() == [[3, 1, 6, 4]]
    assert transform.window == (0, 0, 4, 3)
