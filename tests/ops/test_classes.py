"""The value of each row's class, in every place where heads have their classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.ops.classes import select_class

LABELS = np.array([[3, 1], [2, 3]], np.int32)
# IoUs [K], masks [m, m, K], deltas [K, 4]
SHAPES = [((3,), -1), ((2, 2, 3), -1), ((3, 4), -2)]


def values(shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(*LABELS.shape, *shape)).astype(np.float32)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_each_row_has_its_own_class(shape: tuple[int, ...], axis: int) -> None:
    per_class = values(shape)
    expected = [
        [np.take(row, label - 1, axis) for row, label in zip(rows, labels, strict=True)]
        for rows, labels in zip(per_class, LABELS, strict=True)
    ]
    found = select_class(jnp.array(per_class), jnp.array(LABELS), axis=axis)
    np.testing.assert_array_equal(found, expected)
    # Of one row alone, and of a place counted from the front.
    one = select_class(jnp.array(per_class[1, 0]), jnp.int32(2), axis=len(shape) + axis)
    np.testing.assert_array_equal(one, expected[1][0])


def test_other_labels_are_clipped() -> None:
    """Those of rows that do not exist may be any."""
    ious = jnp.arange(12, dtype=jnp.float32).reshape(2, 2, 3)
    labels = jnp.array([[0, -9], [4, 2**31 - 1]], jnp.int32)
    np.testing.assert_array_equal(select_class(ious, labels), [[0, 3], [8, 11]])


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_a_class_agnostic_value_is_that_of_any_label(shape: tuple[int, ...], axis: int) -> None:
    one = np.take(values(shape), [1], axis)
    found = select_class(jnp.array(one), jnp.array(LABELS), axis=axis)
    np.testing.assert_array_equal(found, np.squeeze(one, axis))


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_other_classes_do_not_matter(shape: tuple[int, ...], axis: int) -> None:
    """Not even if they are NaN, neither to the value nor to the gradient."""
    per_class = np.moveaxis(values(shape), axis, -1)
    own = LABELS.reshape(2, 2, *(1,) * (per_class.ndim - 3), 1) == np.arange(1, 4)
    own = np.broadcast_to(own, per_class.shape)
    poisoned = np.moveaxis(np.where(own, per_class, np.nan), -1, axis)
    value, gradient = jax.value_and_grad(lambda x: select_class(x, LABELS, axis=axis).sum())(
        jnp.array(poisoned)
    )
    np.testing.assert_allclose(value, per_class[own].sum(), rtol=1e-5)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(gradient), axis, -1), own)
