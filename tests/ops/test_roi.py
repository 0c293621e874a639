from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.ops.roi import assign_levels, roi_align

from .strategies import random_boxes

STRIDES = (4, 8)
GRIDS = ((16, 20), (8, 10))


def random_maps(rng: np.random.Generator, channels: int = 3) -> list[np.ndarray]:
    return [rng.normal(size=(*grid, channels)).astype(np.float32) for grid in GRIDS]


def awkward_boxes(rng: np.random.Generator) -> np.ndarray:
    """Canvas 64 x 80: ordinary boxes, then some outside, without area, across and at the border, larger than everything."""
    special = [
        [-30, -30, -10, -10],
        [100, 100, 140, 120],
        [20, 20, 20, 20],
        [20, 20, 20, 40],
        [-10, -6, 30, 20],
        [60, 40, 95, 80],
        [0, 0, 80, 64],
        [76, 60, 80, 64],
        [-200, -200, 300, 300],
        [40, 30, 20, 10],
    ]
    return np.concatenate([random_boxes(rng, 12, extent=60, max_size=40), np.array(special, np.float32)])


def align(
    features: Sequence[np.ndarray], boxes: np.ndarray, levels: np.ndarray, p: int, s: int, valid: np.ndarray | None = None
) -> np.ndarray:
    valid = np.ones(len(boxes), bool) if valid is None else valid
    run = jax.jit(functools.partial(roi_align, strides=STRIDES, output_size=p, sampling_ratio=s))
    return np.asarray(run([jnp.array(f) for f in features], jnp.array(boxes), jnp.array(valid), levels=jnp.array(levels, jnp.int32)))


def align_loop(features: Sequence[np.ndarray], boxes: np.ndarray, levels: np.ndarray, p: int, s: int) -> np.ndarray:
    result = np.zeros((len(boxes), p, p, features[0].shape[-1]))
    for n, (box, level) in enumerate(zip(boxes.astype(np.float64), levels, strict=True)):
        feature, stride = features[level].astype(np.float64), STRIDES[level]
        height, width = feature.shape[:2]
        x1, y1, x2, y2 = box / stride - 0.5
        for i, j, a, b in np.ndindex(p, p, s, s):
            y = y1 + (y2 - y1) / p * (i + (a + 0.5) / s)
            x = x1 + (x2 - x1) / p * (j + (b + 0.5) / s)
            if y < -1 or y > height or x < -1 or x > width:
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = feature[top, left] * (left + 1 - x) + feature[top, right] * (x - left)
            lower = feature[bottom, left] * (left + 1 - x) + feature[bottom, right] * (x - left)
            result[n, i, j] += (upper * (top + 1 - y) + lower * (y - top)) / s**2
    return result


@pytest.mark.parametrize(("p", "s"), [(7, 2), (2, 1), (3, 3)])
def test_equals_loop(p: int, s: int) -> None:
    rng = np.random.default_rng(0)
    features, boxes = random_maps(rng), awkward_boxes(rng)
    levels = rng.integers(0, 2, len(boxes))
    np.testing.assert_allclose(align(features, boxes, levels, p, s), align_loop(features, boxes, levels, p, s), atol=2e-5)


def test_exact_on_a_linear_ramp() -> None:
    """A bin's average of a linear function is its value at the bin's centre, in pixels of the canvas, whatever the level."""
    rng = np.random.default_rng(1)
    ramps = []
    for (height, width), stride in zip(GRIDS, STRIDES, strict=True):
        y, x = np.meshgrid((np.arange(height) + 0.5) * stride, (np.arange(width) + 0.5) * stride, indexing="ij")
        ramps.append(np.stack([x, y, 2 * x - 3 * y + 1], axis=-1).astype(np.float32))
    boxes = random_boxes(rng, 10, extent=20, min_size=2, max_size=30) + np.float32(4)  # away from the border
    levels = np.arange(10) % 2
    x = boxes[:, [0]] + (np.arange(7) + 0.5) / 7 * (boxes[:, [2]] - boxes[:, [0]])
    y = boxes[:, [1]] + (np.arange(7) + 0.5) / 7 * (boxes[:, [3]] - boxes[:, [1]])
    x, y = np.broadcast_to(x[:, None, :], (10, 7, 7)), np.broadcast_to(y[:, :, None], (10, 7, 7))
    np.testing.assert_allclose(align(ramps, boxes, levels, 7, 2), np.stack([x, y, 2 * x - 3 * y + 1], axis=-1), rtol=1e-5, atol=1e-4)


def test_border_rule_by_hand() -> None:
    """Stride 4, 16 x 20 cells: a sample up to one cell centre outside has the border's value, further out 0."""
    features = [np.ones((16, 20, 1), np.float32), np.ones((8, 10, 1), np.float32)]
    centres_and_values = [(-1.9, 1), (-2.1, 0), (81.9, 1), (82.1, 0)]  # x; cells end at -0.5 * 4 = -2 and (20 + 0.5) * 4 = 82
    boxes = np.array([[x - 0.01, 20, x + 0.01, 21] for x, _ in centres_and_values], np.float32)
    assert align(features, boxes, np.zeros(4, int), 1, 1).ravel().tolist() == [value for _, value in centres_and_values]


def dense(features: Sequence[jax.Array], boxes: np.ndarray, levels: np.ndarray, p: int, s: int) -> jax.Array:
    """RoIAlign as two matrix products a box, with hat functions for weights: no gather to differentiate."""

    def weights(start: float, end: float, cells: int) -> jax.Array:
        at = start + (end - start) * (np.arange(p)[:, None] + (np.arange(s) + 0.5) / s) / p
        within = (at >= -1) & (at <= cells)
        hat = np.maximum(0, 1 - np.abs(np.clip(at, 0, cells - 1)[..., None] - np.arange(cells)))
        return jnp.array((hat * within[..., None]).mean(axis=1), jnp.float32)

    rows = []
    for box, level in zip(boxes.astype(np.float64), levels, strict=True):
        x1, y1, x2, y2 = box / STRIDES[level] - 0.5
        feature = features[level]
        rows.append(jnp.einsum("ih,jw,hwc->ijc", weights(y1, y2, feature.shape[0]), weights(x1, x2, feature.shape[1]), feature))
    return jnp.stack(rows)


def test_gradient_equals_autodiff_of_a_dense_formula() -> None:
    rng = np.random.default_rng(2)
    features, boxes = [jnp.array(f) for f in random_maps(rng)], awkward_boxes(rng)
    levels = rng.integers(0, 2, len(boxes))
    cotangent = jnp.array(rng.normal(size=(len(boxes), 5, 5, 3)), jnp.float32)

    def ours(features: list[jax.Array]) -> jax.Array:
        pooled = roi_align(
            features, jnp.array(boxes), jnp.ones(len(boxes), bool),
            levels=jnp.array(levels, jnp.int32), strides=STRIDES, output_size=5, sampling_ratio=2,
        )  # fmt: skip
        return jnp.sum(pooled**2 * cotangent)

    expected = jax.jit(jax.grad(lambda features: jnp.sum(dense(features, boxes, levels, 5, 2) ** 2 * cotangent)))(features)
    for gradient, reference in zip(jax.jit(jax.grad(ours))(features), expected, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=2e-5 * np.abs(reference).max())


def test_batched_gradient_equals_one_image_at_a_time() -> None:
    rng = np.random.default_rng(3)
    features = [jnp.stack([jnp.array(f), jnp.array(f) * 2 + 1]) for f in random_maps(rng)]
    boxes = jnp.array(random_boxes(rng, 10)).reshape(2, 5, 4)
    levels = jnp.array(rng.integers(0, 2, (2, 5)), jnp.int32)

    def loss(features: list[jax.Array], boxes: jax.Array, levels: jax.Array) -> jax.Array:
        pooled = roi_align(features, boxes, jnp.ones(5, bool), levels=levels, strides=STRIDES, output_size=2, sampling_ratio=2)
        return jnp.sum(pooled**2)

    together = jax.jit(jax.vmap(jax.grad(loss)))(features, boxes, levels)
    for image in range(2):
        alone = jax.jit(jax.grad(loss))([f[image] for f in features], boxes[image], levels[image])
        for gradient, reference in zip(together, alone, strict=True):
            np.testing.assert_allclose(gradient[image], reference, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once() -> None:
    """Features in bfloat16: sums in float32 there and back, one rounding at the end of each."""
    rng = np.random.default_rng(4)
    features = [jnp.array(f).astype(jnp.bfloat16) for f in random_maps(rng)]
    boxes, levels = awkward_boxes(rng), rng.integers(0, 2, 22)
    cotangent = jnp.array(rng.normal(size=(22, 5, 5, 3)), jnp.bfloat16)

    def pull(features: list[jax.Array], dtype: jnp.dtype) -> tuple[jax.Array, list[jax.Array]]:
        def pool(features: list[jax.Array]) -> jax.Array:
            return roi_align(
                features, jnp.array(boxes), jnp.ones(22, bool),
                levels=jnp.array(levels, jnp.int32), strides=STRIDES, output_size=5, sampling_ratio=2,
            )  # fmt: skip

        pooled, vjp = jax.vjp(jax.jit(pool), features)
        return pooled, vjp(cotangent.astype(dtype))[0]

    half = pull(features, jnp.bfloat16)
    full = pull([f.astype(jnp.float32) for f in features], jnp.float32)
    for ours, reference in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours.astype(jnp.float32), reference.astype(jnp.bfloat16).astype(jnp.float32))


def test_boxes_get_no_gradient() -> None:
    rng = np.random.default_rng(5)
    features, boxes = [jnp.array(f) for f in random_maps(rng)], jnp.array(random_boxes(rng, 4))

    def total(boxes: jax.Array) -> jax.Array:
        pooled = roi_align(
            features, boxes, jnp.ones(4, bool), levels=jnp.zeros(4, jnp.int32), strides=STRIDES, output_size=2, sampling_ratio=2
        )
        return jnp.sum(pooled)

    assert (np.asarray(jax.jit(jax.grad(total))(boxes)) == 0).all()


LEVELS = [
    ((1, 1), 2), ((111.99, 111.99), 2), ((112, 112), 3), ((223.99, 223.99), 3), ((224, 224), 4), ((447.9, 447.9), 4), ((448, 448), 5),
    ((895, 895), 5), ((896, 896), 5), ((4000, 4000), 5), ((112, 448), 4), ((56, 223), 2), ((56, 224), 3), ((0, 0), 2), ((0, 900), 2),
]  # fmt: skip


@pytest.mark.parametrize(("size", "level"), LEVELS)
def test_level_rule_at_the_borders(size: tuple[float, float], level: int) -> None:
    boxes = jnp.array([[8, 16, 8 + size[0], 16 + size[1]]], jnp.float32)
    assert assign_levels(boxes, canonical_size=224.0, canonical_level=4, min_level=2, max_level=5).tolist() == [level]


def test_level_rule_equals_the_formula() -> None:
    boxes = random_boxes(np.random.default_rng(6), 500, min_size=2, max_size=900)
    expected = []
    for x1, y1, x2, y2 in boxes.astype(np.float64):
        k = math.floor(3 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 100))
        expected.append(min(max(k, 1), 6))
    levels = assign_levels(jnp.array(boxes), canonical_size=100.0, canonical_level=3, min_level=1, max_level=6)
    assert levels.dtype == jnp.int32
    np.testing.assert_array_equal(levels, expected)
