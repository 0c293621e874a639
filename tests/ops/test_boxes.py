from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrcnn_jax.ops import boxes as box_ops

from .strategies import QUICK, float_boxes, integer_boxes, random_boxes

ONES = (1.0, 1.0, 1.0, 1.0)
iou = jax.jit(box_ops.iou)


def iou_loop(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    result = np.zeros((len(a), len(b)))
    for i, p in enumerate(a.astype(np.float64)):
        for j, q in enumerate(b.astype(np.float64)):
            width, height = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
            shared = width * height if width > 0 and height > 0 else 0.0
            union = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - shared
            result[i, j] = shared / union if union > 0 else 0.0
    return result


def test_area_by_hand() -> None:
    boxes = [[1, 2, 4, 8], [5, 5, 5, 9], [4, 8, 1, 2], [4, 2, 1, 8], [1, 8, 4, 2]]
    assert box_ops.area(jnp.array(boxes, jnp.float32)).tolist() == [18, 0, 0, 0, 0]


@QUICK
@given(integer_boxes(6), integer_boxes(5))
def test_iou_equals_loop(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(iou(a, b), iou_loop(a, b), rtol=1e-6)


@QUICK
@given(float_boxes(8), float_boxes(8))
def test_iou_is_symmetric_in_unit_range_and_one_for_itself(a: np.ndarray, b: np.ndarray) -> None:
    overlap = np.asarray(iou(a, b))
    # Not bit-equal: compilers fuse one of the two products with the sum.
    np.testing.assert_allclose(overlap, np.asarray(iou(b, a)).T, rtol=1e-6)
    assert (overlap >= 0).all()
    assert (overlap <= 1 + 1e-6).all()
    measurable = np.asarray(box_ops.area(a)) > box_ops.EMPTY_AREA
    np.testing.assert_allclose(np.diag(iou(a, a))[measurable], 1, rtol=1e-6)


def test_iou_of_extreme_boxes_is_finite() -> None:
    top = float(np.finfo(np.float32).max)
    boxes = jnp.array(
        [
            [0, 0, 0, 0],
            [3, 3, 1, 1],
            [-top, 0, top, 0],
            [-top, -top, top, top],
            [0, 0, 1e9, 1e9],
            [0, 0, 2, 2],
        ],
        jnp.float32,
    )
    assert np.isfinite(iou(boxes, boxes)).all()
    assert np.isfinite(box_ops.intersection_over_area(boxes, boxes)).all()


@pytest.mark.parametrize("side", [0, 1e-25, 1e-10, 1e-9])
def test_gradients_are_finite_where_boxes_are_almost_points(side: float) -> None:
    boxes = jnp.array(
        [[0, 0, side, side], [0, 0, side / 2, side], [5, 5, 5, 5], [0, 0, 2, 3]], jnp.float32
    )
    for overlap in (
        box_ops.iou,
        box_ops.intersection_over_area,
        lambda a, b: box_ops.giou(a, b[::-1]),
    ):
        for gradient in jax.jit(jax.grad(lambda a, b, f=overlap: jnp.sum(f(a, b)), argnums=(0, 1)))(
            boxes, boxes
        ):
            assert np.isfinite(gradient).all()


def test_giou_by_hand() -> None:
    pairs = [
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7 - 2 / 9),
        ([0, 0, 4, 4], [1, 1, 3, 3], 1 / 4),
        ([0, 0, 1, 1], [3, 0, 4, 1], -2 / 4),
        ([0, 0, 1, 1], [99, 99, 100, 100], -9998 / 10000),
        ([3, 4, 9, 9], [3, 4, 9, 9], 1),
        ([0, 0, 0, 0], [2, 3, 2, 3], -1),  # nothing in the box around both is covered
        ([2, 3, 2, 3], [2, 3, 2, 3], 0),
        ([0, 0, 0, 5], [0, 0, 0, 5], 0),
    ]
    a, b, expected = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    np.testing.assert_allclose(box_ops.giou(a, b), expected, rtol=1e-6)
    # Any leading axes.
    np.testing.assert_allclose(
        box_ops.giou(b.reshape(2, 4, 4), a.reshape(2, 4, 4)), expected.reshape(2, 4), rtol=1e-6
    )


@QUICK
@given(integer_boxes(8), integer_boxes(8))
def test_giou_equals_loop(a: np.ndarray, b: np.ndarray) -> None:
    expected = np.diag(iou_loop(a, b)).copy()
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        covered = {
            (x, y)
            for box in (p, q)
            for x in range(int(box[0]), int(box[2]))
            for y in range(int(box[1]), int(box[3]))
        }
        around = (max(p[2], q[2]) - min(p[0], q[0])) * (max(p[3], q[3]) - min(p[1], q[1]))
        expected[i] -= (around - len(covered)) / around if around else 0
    np.testing.assert_allclose(
        box_ops.giou(jnp.array(a), jnp.array(b)), expected, rtol=1e-5, atol=1e-6
    )


def test_intersection_over_area_is_a_share_of_the_first() -> None:
    a = jnp.array([[0, 0, 4, 4], [0, 0, 2, 2], [7, 7, 7, 9]], jnp.float32)
    crowd = jnp.array([[2, 0, 100, 100], [0, 0, 2, 2]], jnp.float32)
    assert box_ops.intersection_over_area(a, crowd).tolist() == [[0.5, 0.25], [0, 1], [0, 0]]


def test_encode_by_hand() -> None:
    anchors = jnp.array([[0, 0, 10, 20], [0, 0, 10, 20]], jnp.float32)  # centre (5, 10)
    boxes = jnp.array([[4, 8, 24, 18], [0, 0, 10, 20]], jnp.float32)  # centre (14, 13), 20 x 10
    expected = [0.9, 0.15, math.log(2), -math.log(2)]
    np.testing.assert_allclose(
        box_ops.encode(boxes, anchors, weights=ONES), [expected, [0, 0, 0, 0]], rtol=1e-6
    )
    weighted = np.array(expected) * [10, 10, 5, 4]
    np.testing.assert_allclose(
        box_ops.encode(boxes, anchors, weights=(10, 10, 5, 4))[0], weighted, rtol=1e-6
    )


def test_decode_by_hand() -> None:
    anchors = jnp.array([[0, 0, 10, 20]], jnp.float32)
    deltas = jnp.array([[9, 1.5, 5 * math.log(2), -4 * math.log(2)]], jnp.float32)
    np.testing.assert_allclose(
        box_ops.decode(deltas, anchors, weights=(10, 10, 5, 4)), [[4, 8, 24, 18]], rtol=1e-6
    )


def test_decode_clips_growth_at_62_5_and_nothing_below() -> None:
    anchors = jnp.array([[0, 0, 16, 16]] * 3, jnp.float32)
    deltas = jnp.array(
        [[0, 0, 50, 1e4], [0, 0, math.log(62.4), math.log(62.6)], [0, 0, -20, -20]], jnp.float32
    )
    decoded = np.asarray(box_ops.decode(deltas, anchors, weights=ONES))
    np.testing.assert_allclose(decoded[0], [-492, -492, 508, 508], rtol=1e-5)
    np.testing.assert_allclose(decoded[1, 2:] - decoded[1, :2], [62.4 * 16, 1000], rtol=1e-5)
    assert (decoded[2, 2:] - decoded[2, :2] < 1e-6).all()


@jax.jit
def round_trip(boxes: jax.Array, anchors: jax.Array) -> jax.Array:
    return box_ops.decode(
        box_ops.encode(boxes, anchors, weights=(10, 10, 5, 5)), anchors, weights=(10, 10, 5, 5)
    )


@QUICK
@given(
    float_boxes(8, min_size=2**-6),
    st.floats(0.02, 60),
    st.floats(0.02, 60),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_decode_inverts_encode(
    boxes: np.ndarray, wider: float, higher: float, dx: float, dy: float
) -> None:
    """Boxes of 1/64 to 4,096 px, anchors up to 60 times as large or small, two sides away."""
    size = boxes[:, 2:] - boxes[:, :2]
    swallowed = (size <= 0).any(axis=1)  # a side below the float32 step of its corner
    size = np.where(size > 0, size, 1)
    anchor_size = size * [wider, higher]
    centre = boxes[:, :2] + size / 2 + anchor_size * [dx, dy]
    anchors = np.concatenate([centre - anchor_size / 2, centre + anchor_size / 2], axis=1).astype(
        np.float32
    )
    usable = ~swallowed & (size / np.maximum(anchors[:, 2:] - anchors[:, :2], 1e-9) < 62).all(
        axis=1
    )
    error = np.abs(np.asarray(round_trip(boxes, anchors)) - boxes).max(axis=1)
    # A few roundings, each relative to the largest number that enters.
    bound = (
        16
        * np.finfo(np.float32).eps
        * (np.abs(boxes).max(axis=1) + np.abs(anchors).max(axis=1) + 3 * anchor_size.max(axis=1))
    )
    assert (error <= bound)[usable].all()


def test_encode_of_degenerate_rows_is_zero_with_zero_gradient() -> None:
    anchors = jnp.array([[0, 0, 4, 4], [2, 2, 2, 2], [0, 0, 4, 4], [0, 0, 4, 4]], jnp.float32)
    boxes = jnp.array([[1, 1, 1, 5], [0, 0, 4, 4], [jnp.nan] * 4, [1, 1, 3, 3]], jnp.float32)
    deltas = box_ops.encode(boxes, anchors, weights=ONES)
    assert (np.asarray(deltas[:3]) == 0).all()
    assert deltas[3].tolist() == pytest.approx([0, 0, -math.log(2), -math.log(2)])
    differentiate = jax.jit(
        jax.grad(lambda b, a: jnp.sum(box_ops.encode(b, a, weights=ONES)), argnums=(0, 1))
    )
    for gradient in differentiate(boxes, anchors):
        assert (np.asarray(gradient[:3]) == 0).all()
        assert np.isfinite(gradient).all()
        assert np.abs(np.asarray(gradient[3])).max() > 0


@QUICK
@given(float_boxes(8, low=-5000), st.integers(1, 4096), st.integers(1, 4096))
def test_clip_is_idempotent_and_inside(boxes: np.ndarray, height: int, width: int) -> None:
    size = jnp.array([height, width])
    once = np.asarray(box_ops.clip(jnp.array(boxes), size))
    np.testing.assert_array_equal(box_ops.clip(jnp.array(once), size), once)
    assert (once >= 0).all()
    assert (once[:, [0, 2]] <= width).all()
    assert (once[:, [1, 3]] <= height).all()
    inside = (boxes >= 0).all(axis=1) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
    np.testing.assert_array_equal(once[inside], boxes[inside])


def test_clip_by_hand_takes_any_leading_axes() -> None:
    boxes = jnp.array([[[-1, -2, 50, 60]], [[3, 4, 5, 6]]], jnp.float32)
    for size in (jnp.array([30, 40]), jnp.array([30.0, 40.0], jnp.float32)):
        assert box_ops.clip(boxes, size).tolist() == [[[0, 0, 40, 30]], [[3, 4, 5, 6]]]


def test_sanitize_replaces_invalid_rows_alone() -> None:
    boxes = jnp.array(random_boxes(np.random.default_rng(0), 3)).at[1].set(jnp.nan)
    clean = box_ops.sanitize(boxes, jnp.array([True, False, True]))
    assert clean[1].tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(clean[::2], boxes[::2])
