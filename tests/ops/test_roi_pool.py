from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from roi_cases import STRIDES, Case, case

from mrcnn_jax.ops.roi import roi_pool


def pool(
    case: Case, size: int, strides: Sequence[int] = STRIDES
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(features of the boxes, gradients of the maps for the case's cotangent)."""

    @functools.partial(jax.jit, static_argnames="size")
    def run(
        features: list[jax.Array], cotangent: jax.Array, size: int
    ) -> tuple[jax.Array, list[jax.Array]]:
        def pooled(features: list[jax.Array]) -> jax.Array:
            boxes, levels = jnp.array(case.boxes), jnp.array(case.levels)
            return roi_pool(
                features,
                boxes,
                jnp.ones(len(boxes), bool),
                levels=levels,
                strides=strides,
                output_size=size,
            )

        value, vjp = jax.vjp(pooled, features)
        return value, vjp(cotangent)[0]

    value, gradients = run([jnp.array(f) for f in case.features], jnp.array(case.cotangent), size)
    return np.asarray(value), [np.asarray(gradient) for gradient in gradients]


def half_away(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def loop(
    case: Case, size: int, strides: Sequence[int] = STRIDES
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Fast R-CNN's definition, with float32 bins as in torchvision; argmax is the first maximum."""
    pooled, gradients = np.zeros_like(case.cotangent), [np.zeros_like(f) for f in case.features]
    for n, level in enumerate(case.levels):
        feature, gradient = case.features[level], gradients[level]
        x1, y1, x2, y2 = (
            half_away(corner) for corner in case.boxes[n].astype(np.float64) / strides[level]
        )

        def bins(first: int, last: int, side: int) -> list[slice]:
            step = np.float32(max(last - first + 1, 1)) / np.float32(size)
            ends = [
                (math.floor(np.float32(i) * step), math.ceil(np.float32(i + 1) * step))
                for i in range(size)
            ]
            return [slice(*(min(max(first + end, 0), side) for end in pair)) for pair in ends]

        rows, columns = bins(y1, y2, feature.shape[0]), bins(x1, x2, feature.shape[1])
        for i, j, c in np.ndindex(size, size, feature.shape[2]):
            part = feature[rows[i], columns[j], c]
            if part.size:
                y, x = np.unravel_index(part.argmax(), part.shape)
                pooled[n, i, j, c] = part[y, x]
                gradient[rows[i].start + y, columns[j].start + x, c] += case.cotangent[n, i, j, c]
    return pooled, gradients


def assert_equal(case: Case, size: int, strides: Sequence[int] = STRIDES) -> None:
    (ours, our_gradients), (theirs, their_gradients) = (
        pool(case, size, strides),
        loop(case, size, strides),
    )
    np.testing.assert_array_equal(ours, theirs)
    for gradient, reference in zip(our_gradients, their_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_equals_loop(size: int) -> None:
    assert_equal(case(11, size=size), size)


def test_any_box_on_a_large_map() -> None:
    """Bins of one cell up to the whole map; 57 and 114 cells, which float32 rounds up."""
    rng = np.random.default_rng(12)
    feature = np.maximum(rng.normal(size=(90, 150, 2)), 0).astype(np.float32)
    corners, sides = rng.uniform(-60, 140, (40, 2)), np.exp(rng.uniform(0, 6, (40, 2)))
    special = [
        [0, 0, 149, 89], [0, 40, 149, 41], [70, 0, 70, 89], [20, 3, 76, 59], [30, 0, 143, 89],
        [5, 5, 67, 60], [-700, -900, 800, 950], [-3000, 10, 4000, 20],
    ]  # fmt: skip
    boxes = np.concatenate([np.concatenate([corners, corners + sides], axis=1), special]).astype(
        np.float32
    )
    cotangent = rng.normal(size=(len(boxes), 7, 7, 2)).astype(np.float32)
    assert_equal(Case([feature], boxes, np.zeros(len(boxes), np.int32), cotangent), 7, (1,))


@pytest.mark.parametrize("vertical", [False, True])
def test_every_range_of_cells(vertical: bool) -> None:
    """The maximum of each range of a row and a column of 160 cells, constant maps included."""
    side = 160
    rng = np.random.default_rng(13)
    cells = np.stack([rng.permutation(side), np.zeros(side)], axis=-1).astype(np.float32)
    low, high = np.triu_indices(side + 1, 1)
    first = np.zeros_like(low)
    boxes = np.stack([low, first, high - 1, first], axis=1).astype(np.float32)
    cotangent = np.ones((len(low), 1, 1, 2), np.float32)
    feature, boxes = (cells[:, None], boxes[:, [1, 0, 3, 2]]) if vertical else (cells[None], boxes)
    pooled, (gradient,) = pool(
        Case([feature], boxes, np.zeros(len(low), np.int32), cotangent), 1, (1,)
    )
    expected = np.array([cells[a:b].max(axis=0) for a, b in zip(low, high, strict=True)])
    np.testing.assert_array_equal(pooled[:, 0, 0], expected)
    where = np.argsort(cells[:, 0])[expected[:, 0].astype(int)]
    np.testing.assert_array_equal(
        gradient.reshape(side, 2)[:, 0], np.bincount(where, minlength=side)
    )
    np.testing.assert_array_equal(gradient.reshape(side, 2)[:, 1], np.bincount(low, minlength=side))


def test_not_a_number_in_a_map_stays_visible_and_does_no_harm() -> None:
    feature = np.arange(36, dtype=np.float32).reshape(6, 6, 1)
    feature[1, 1] = np.nan
    inputs = Case(
        [feature],
        np.array([[0, 0, 5, 5]], np.float32),
        np.zeros(1, np.int32),
        np.ones((1, 2, 2, 1), np.float32),
    )
    pooled, (gradient,) = pool(inputs, 2, (1,))
    np.testing.assert_array_equal(pooled[0, :, :, 0], [[np.nan, 17], [32, 35]])
    assert np.argwhere(gradient[..., 0]).tolist() == [[2, 5], [5, 2], [5, 5]]
