from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.ops.masks import area_outside, crop_targets, point_targets

from .strategies import random_boxes


def targets(
    masks: np.ndarray,
    gt_boxes: np.ndarray,
    gt_index: np.ndarray,
    boxes: np.ndarray,
    size: int,
    *,
    soft: bool = False,
) -> np.ndarray:
    run = jax.jit(functools.partial(crop_targets, size=size, soft=soft))
    return np.asarray(
        run(jnp.array(masks), jnp.array(gt_boxes), jnp.array(gt_index, jnp.int32), jnp.array(boxes))
    )


def coverage_loop(
    masks: np.ndarray, gt_boxes: np.ndarray, gt_index: np.ndarray, boxes: np.ndarray, size: int
) -> np.ndarray:
    """Coverage 0..255 before the cut at one half, by a loop over points."""
    m = masks.shape[-1]
    result = np.zeros((len(boxes), size, size))
    for n, (index, box) in enumerate(zip(gt_index, boxes.astype(np.float64), strict=True)):
        gx1, gy1, gx2, gy2 = gt_boxes[index].astype(np.float64)
        mask = masks[index].astype(np.float64)
        for i, j in np.ndindex(size, size):
            x = box[0] + (j + 0.5) / size * (box[2] - box[0])
            y = box[1] + (i + 0.5) / size * (box[3] - box[1])
            if not (gx1 <= x <= gx2 and gy1 <= y <= gy2):
                continue
            u = min(max((x - gx1) / (gx2 - gx1) * m - 0.5, 0), m - 1)
            v = min(max((y - gy1) / (gy2 - gy1) * m - 0.5, 0), m - 1)
            left, top = min(math.floor(u), m - 2), min(math.floor(v), m - 2)
            a, b = u - left, v - top
            upper = (1 - a) * mask[top, left] + a * mask[top, left + 1]
            lower = (1 - a) * mask[top + 1, left] + a * mask[top + 1, left + 1]
            result[n, i, j] = (1 - b) * upper + b * lower
    return result


def test_equals_loop() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 256, (4, 9, 9)).astype(np.uint8)
    gt_boxes, boxes = random_boxes(rng, 4, extent=20), random_boxes(rng, 20, extent=20)
    gt_index = rng.integers(0, 4, 20)
    coverage = coverage_loop(masks, gt_boxes, gt_index, boxes, 14)
    clear = np.abs(coverage - 127.5) > 0.01  # elsewhere float32 may fall on the other side
    result = targets(masks, gt_boxes, gt_index, boxes, 14)
    assert result.dtype == np.float32
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(result[clear], (coverage >= 127.5)[clear])
    assert 0.05 < result.mean() < 0.95


def test_soft_targets_are_the_mean_of_four_points() -> None:
    rng = np.random.default_rng(2)
    masks = rng.integers(0, 256, (4, 9, 9)).astype(np.uint8)
    gt_boxes, boxes = random_boxes(rng, 4, extent=20), random_boxes(rng, 20, extent=20)
    boxes[:4] = gt_boxes
    gt_index = np.r_[0:4, rng.integers(0, 4, 16)]
    points = coverage_loop(masks, gt_boxes, gt_index, boxes, 14)
    expected = np.zeros((20, 7, 7))
    for i, j in np.ndindex(7, 7):
        expected[:, i, j] = points[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) / 255
    result = targets(masks, gt_boxes, gt_index, boxes, 7, soft=True)
    close = np.abs(result - expected) < 1e-4  # a point on a border may fall on its other side
    assert close.mean() > 0.99
    assert (np.abs(expected - 0.5) < 0.4).mean() > 0.1


def test_a_soft_target_is_the_share_of_the_cell_that_is_covered() -> None:
    """A disc in 112 cells, cut to its own box in 28: the mean of 4 x 4 cells each."""
    y, x = np.mgrid[:112, :112] + 0.5
    disc = np.where((x - 56) ** 2 + (y - 56) ** 2 < 50**2, 255, 0).astype(np.uint8)
    box = np.array([[3, 5, 85, 61]], np.float32)
    result = targets(disc[None], box, np.array([0]), box, 28, soft=True)[0]
    np.testing.assert_allclose(result, disc.reshape(28, 4, 28, 4).mean((1, 3)) / 255, atol=1e-3)


def test_by_hand() -> None:
    masks = np.zeros((2, 4, 4), np.uint8)
    masks[1, :, :2] = 255  # left half
    gt_boxes = np.array([[0, 0, 1, 1], [10, 20, 18, 28]], np.float32)
    boxes = np.array(
        [[10, 20, 18, 28], [10, 24, 26, 32], [14.5, 20, 18, 28], [30, 30, 40, 40]], np.float32
    )
    result = targets(masks, gt_boxes, np.array([1, 1, 1, 1]), boxes, 4)
    left_half = [[1, 1, 0, 0]] * 4
    top_left = [[1, 0, 0, 0]] * 2 + [[0, 0, 0, 0]] * 2
    np.testing.assert_array_equal(result, [left_half, top_left, np.zeros((4, 4)), np.zeros((4, 4))])
    # Its outline, where the coverage is exactly one half, is of the object.
    index, boxes = np.array([1, 1]), np.array([[13, 20, 15, 28], [13, 20, 15.1, 28]], np.float32)
    assert targets(masks, gt_boxes, index, boxes, 1).ravel().tolist() == [1, 0]
    centres = jnp.full((2, 1, 2), 0.5, jnp.float32)
    at = jax.jit(point_targets)(*map(jnp.array, (masks, gt_boxes, index, boxes)), centres)
    assert at.ravel().tolist() == [1, 0]


def test_same_size_gives_the_mask_back_and_half_coverage_counts() -> None:
    rng = np.random.default_rng(1)
    masks = rng.integers(0, 256, (1, 16, 16)).astype(np.uint8)
    masks[0, 0, :2] = (127, 128)
    box = np.array([[3, 5, 35, 37]], np.float32)
    np.testing.assert_array_equal(targets(masks, box, np.array([0]), box, 16)[0], masks[0] >= 128)


def test_partly_covered_border_cells_do_not_fade() -> None:
    """A box whose outermost cells are 60 % covered is covered up to its border, and no further."""
    masks = np.full((1, 8, 8), 153, np.uint8)
    gt, box = np.array([[8, 8, 16, 16]], np.float32), np.array([[0, 0, 24, 24]], np.float32)
    expected = np.zeros((24, 24))
    expected[8:16, 8:16] = 1
    np.testing.assert_array_equal(targets(masks, gt, np.array([0]), box, 24)[0], expected)


def test_rows_of_no_use_are_finite() -> None:
    masks = np.full((3, 4, 4), 255, np.uint8)
    gt_boxes = np.array([[np.nan] * 4, [5, 5, 5, 9], [1e9] * 4], np.float32)
    boxes = np.array([[0, 0, 8, 8], [0, 0, 8, 8], [np.nan] * 4, [1e9] * 4], np.float32)
    index = np.array([0, 1, 2, 2], np.int32)
    assert (targets(masks, gt_boxes, index, boxes, 3) == 0).all()
    assert np.isfinite(area_outside(*map(jnp.array, (masks, gt_boxes, index, boxes)), size=3)[1])
    boxes, gt_boxes = np.ones((4, 4), np.float32), np.ones((3, 4), np.float32)  # without an area
    assert np.isfinite(area_outside(*map(jnp.array, (masks, gt_boxes, index, boxes)), size=3)).all()


def test_area_outside_by_hand() -> None:
    """An object of 8 x 8 pixels, its left half covered; a cell of the box is 4 x 2 pixels."""
    masks = np.zeros((1, 4, 4), np.uint8)
    masks[0, :, :2] = 255
    own, index = np.array([[10, 20, 18, 28]], np.float32), np.zeros(4, np.int32)
    boxes = np.array(
        [[10, 20, 18, 24], [9, 15, 17, 19], [13, 20, 21, 24], [10, 21, 18, 25]], np.float32
    )
    found = area_outside(*map(jnp.array, (masks, own, index, boxes)), size=2)
    # 4 x 8 pixels are covered; inside are 4 x 4, none, 1 x 4 and 4 x 4.
    np.testing.assert_allclose(found, [16 / 8, 32 / 8, 28 / 8, 16 / 8], rtol=1e-6)


def test_area_outside_equals_sums_over_points() -> None:
    rng = np.random.default_rng(3)
    masks = rng.integers(0, 256, (3, 5, 5)).astype(np.uint8)
    own, boxes = random_boxes(rng, 3, extent=20), random_boxes(rng, 12, extent=20)
    index = rng.integers(0, 3, 12).astype(np.int32)
    boxes[0] = own[index[0]] + np.float32([-1, -1, 1, 1])
    found = np.asarray(area_outside(*map(jnp.array, (masks, own, index, boxes)), size=6))
    for k, box, area in zip(index, boxes.astype(float), found, strict=True):
        gt = own[k].astype(float)
        at = (np.arange(400) + 0.5) / 400
        x, y = (gt[i] + at * (gt[i + 2] - gt[i]) for i in (0, 1))
        inside = ((y >= box[1]) & (y <= box[3]))[:, None] & ((x >= box[0]) & (x <= box[2]))[None]
        covered = np.kron(masks[k] / 255, np.ones((80, 80)))
        pixels = (gt[2] - gt[0]) * (gt[3] - gt[1]) / 400**2
        cell = (box[2] - box[0]) * (box[3] - box[1]) / 36
        outside, whole = (part.sum() * pixels / cell for part in (covered * ~inside, covered))
        assert area == pytest.approx(outside, abs=0.01 * whole)
    assert found[0] == 0
