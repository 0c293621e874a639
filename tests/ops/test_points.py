"""Points of boxes against algebra and NumPy loops, and the laws of padded sets."""

from __future__ import annotations

import functools
import math
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.ops import losses
from mrcnn_jax.ops.masks import crop_targets, point_targets
from mrcnn_jax.ops.points import sample_grids, sample_map, subdivide, uncertain_points
from mrcnn_jax.pixels.geometry import paste

from .laws import Outcome, assert_laws
from .strategies import random_boxes
from .test_masks import coverage_loop

RNG = np.random.default_rng(0)


def bilinear_loop(grid: np.ndarray, x: float, y: float) -> np.ndarray:
    """A grid [h, w, ...] at (x, y) in cells, whose centres lie at i + 0.5."""
    height, width = grid.shape[:2]
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    left, top = min(math.floor(x), width - 2), min(math.floor(y), height - 2)
    a, b = x - left, y - top
    upper = (1 - a) * grid[top, left] + a * grid[top, left + 1]
    lower = (1 - a) * grid[top + 1, left] + a * grid[top + 1, left + 1]
    return (1 - b) * upper + b * lower


def test_a_linear_ramp_is_read_exactly() -> None:
    """A ramp: pixels at the centres of cells, (i + 0.5) stride; constant beyond the outermost."""
    y, x = (np.mgrid[:12, :20].astype(np.float32) + 0.5) * 4
    ramp = jnp.array(np.stack([x, 3 * y - x], axis=-1))
    boxes, points = random_boxes(RNG, 30, extent=48), RNG.random((30, 9, 2)).astype(np.float32)
    valid = np.arange(30) % 5 > 0
    values = np.asarray(
        jax.jit(functools.partial(sample_map, stride=4))(
            ramp, jnp.array(boxes), jnp.array(valid), jnp.array(points)
        )
    )
    at = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])
    at = np.clip(at, 2, [78, 46])
    expected = np.stack([at[..., 0], 3 * at[..., 1] - at[..., 0]], axis=-1)
    np.testing.assert_allclose(values[valid], expected[valid], rtol=1e-5, atol=1e-4)
    assert (values[~valid] == 0).all()


def test_each_box_reads_its_own_grid() -> None:
    grids, points = (
        RNG.normal(size=(4, 5, 5)).astype(np.float32),
        RNG.random((4, 7, 2)).astype(np.float32),
    )
    told = RNG.normal(size=(4, 7)).astype(np.float32)

    @jax.jit
    def read(grids: jax.Array, told: jax.Array) -> Any:
        values, pull = jax.vjp(lambda grids: sample_grids(grids, jnp.array(points)), grids)
        return values, pull(told)[0]

    values, gradient = read(grids, told)
    expected = [
        [bilinear_loop(grid, *(5 * point)) for point in rows]
        for grid, rows in zip(grids, points, strict=True)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    # Weights of a point sum to 1, and what a grid is told comes from its own points.
    np.testing.assert_allclose(gradient.sum((1, 2)), told.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("share", "nearest"), [(0.75, 75), (0.29, 29)])
def test_points_gather_where_the_mask_is_uncertain(share: float, nearest: int) -> None:
    """On a ramp with its outline at x = 0.5, 75 of 100 points are the nearest quarter of 300; and
    29 % of 100 are 29, though in floating point they are less."""
    ramp = jnp.array(np.tile(np.arange(28) + 0.5 - 14, (8, 28, 1)), jnp.float32)
    draw = jax.jit(
        functools.partial(uncertain_points, count=100, oversampling=3, uncertain_fraction=share)
    )
    points = np.asarray(draw(jax.random.key(0), ramp))
    assert points.shape == (8, 100, 2)
    assert len(np.unique(points[..., 0])) == 800
    distance = np.abs(points[..., 0] - 0.5)
    assert distance[:, :nearest].max() == pytest.approx(nearest / 600, abs=0.03)
    assert distance[:, :nearest].mean() == pytest.approx(nearest / 1200, abs=0.006)
    assert distance[:, nearest:].mean() == pytest.approx(0.25, abs=0.03)
    assert (points >= 0).all()
    assert (points < 1).all()
    assert points[..., 1].mean() == pytest.approx(0.5, abs=0.03)


def test_targets_of_points_are_those_of_cells() -> None:
    masks = RNG.integers(0, 256, (4, 9, 9)).astype(np.uint8)
    gt_boxes, boxes, index = (
        random_boxes(RNG, 4, extent=20),
        random_boxes(RNG, 20, extent=20),
        RNG.integers(0, 4, 20).astype(np.int32),
    )
    centres = (np.stack(np.meshgrid(*[np.arange(6)] * 2), axis=-1).reshape(1, 36, 2) + 0.5) / 6
    random = RNG.random((20, 8, 2))
    points = np.concatenate([np.broadcast_to(centres, (20, 36, 2)), random], axis=1).astype(
        np.float32
    )
    found = np.asarray(
        jax.jit(point_targets)(*map(jnp.array, (masks, gt_boxes, index, boxes, points)))
    )
    expected = jax.jit(functools.partial(crop_targets, size=6))(
        *map(jnp.array, (masks, gt_boxes, index, boxes))
    )
    assert (
        found[:, :36] == np.asarray(expected).reshape(20, 36)
    ).mean() > 0.99  # float32 at the cut
    at = boxes[:, None, :2] + points[:, 36:] * (boxes[:, None, 2:] - boxes[:, None, :2])
    single = np.concatenate([at, at], axis=-1).reshape(
        -1, 4
    )  # a box without area: its only cell is that point
    coverage = coverage_loop(masks, gt_boxes, np.repeat(index, 8), single, 1).reshape(20, 8)
    clear = np.abs(coverage - 127.5) > 0.01
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[:, 36:][clear], (coverage >= 127.5)[clear])
    assert 0.05 < found.mean() < 0.95


def subdivide_loop(
    logits: np.ndarray, steps: int, count: int
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """One mask, each cell predicted as 100 x + y, and the points asked for."""
    asked = []
    for _ in range(steps):
        side = 2 * len(logits)
        doubled = np.array(
            [
                [bilinear_loop(logits, (j + 0.5) / 2, (i + 0.5) / 2) for j in range(side)]
                for i in range(side)
            ]
        )
        for cell in np.argsort(np.abs(doubled).ravel())[:count]:
            i, j = divmod(int(cell), side)
            x, y = (j + 0.5) / side, (i + 0.5) / side
            doubled[i, j] = 100 * x + y
            asked.append((x, y))
        logits = doubled
    return logits, asked


def test_subdivision_equals_a_loop() -> None:
    """The first doubling has 64 cells, fewer than are asked for; the second 256."""
    masks = RNG.normal(size=(2, 3, 4, 4)).astype(np.float32)

    @jax.jit
    def run(masks: jax.Array) -> Any:
        asked = []

        def predict(points: jax.Array) -> jax.Array:
            asked.append(points)
            return 100 * points[..., 0] + points[..., 1]

        return subdivide(masks, predict, steps=2, count=70), asked

    result, asked = jax.tree.map(np.asarray, run(masks))
    assert result.shape == (2, 3, 16, 16)
    for place in np.ndindex(2, 3):
        expected, points = subdivide_loop(masks[place].astype(np.float64), 2, 70)
        np.testing.assert_allclose(result[place], expected, rtol=1e-4, atol=1e-5)
        found = np.concatenate([part[place] for part in asked])
        np.testing.assert_allclose(np.sort(found, axis=0), np.sort(points, axis=0), rtol=1e-6)


def test_a_disc_comes_out_rounder() -> None:
    """A 28 x 28 mask of a disc of 448 px, doubled twice, misses less than half as much as before.

    The points predict the truth."""
    y, x = (np.mgrid[:448, :448] + 0.5) / 448
    disc = np.hypot(x - 0.5, y - 0.5) < 0.47
    coverage = cv2.resize(disc.astype(np.float32), (28, 28), interpolation=cv2.INTER_AREA)
    coarse = jnp.array(
        np.where(coverage >= 0.5, 4, -4)[None], jnp.float32
    )  # a hard decision a cell, as of a trained branch

    def truth(points: jax.Array) -> jax.Array:
        return jnp.where(jnp.hypot(points[..., 0] - 0.5, points[..., 1] - 0.5) < 0.47, 4.0, -4.0)

    def iou(logits: jax.Array) -> float:
        probabilities, _ = paste(
            np.asarray(jax.nn.sigmoid(logits))[0],
            np.array([0, 0, 448, 448], np.float32),
            (448, 448),
        )
        pasted = probabilities >= 0.5
        return float((pasted & disc).sum() / (pasted | disc).sum())

    refined = jax.jit(lambda coarse: subdivide(coarse, truth, steps=2, count=784))(coarse)
    assert refined.shape == (1, 112, 112)
    assert 1 - iou(refined) < (1 - iou(coarse)) / 2


def test_laws_of_padded_sets() -> None:
    feature, others = (
        jnp.array(RNG.normal(size=(5, 6, 3)), jnp.float32),
        jnp.array(random_boxes(RNG, 4)),
    )
    crops = jnp.array(RNG.integers(0, 256, (4, 6, 6)), jnp.uint8)
    rows = {
        "boxes": random_boxes(RNG, 8),
        "points": RNG.random((8, 5, 2)).astype(np.float32),
        "grids": RNG.normal(size=(8, 4, 4)).astype(np.float32),
        "index": RNG.integers(0, 4, 8).astype(np.int32),
    }

    def function(rows: dict[str, Any], valid: jax.Array) -> Outcome:
        fine = sample_map(feature, rows["boxes"], valid, rows["points"], stride=16)
        coarse = losses.zero_invalid(sample_grids(rows["grids"], rows["points"]), valid)
        targets = point_targets(
            crops, others, jnp.where(valid, rows["index"], 0), rows["boxes"], rows["points"]
        )
        values = losses.binary_cross_entropy(
            fine.sum(-1) + coarse, losses.zero_invalid(targets, valid)
        )
        return Outcome(
            rows=(fine, coarse, targets), totals=(losses.masked_mean(values, valid), jnp.sum(fine))
        )

    assert_laws(function, rows, np.arange(8) % 3 > 0)
