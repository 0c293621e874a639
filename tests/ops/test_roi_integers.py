"""RoIAlign's gradient on a GPU, `deterministic`: sums of integers instead of floats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.ops.roi import _scatter, _scatter_integers

ROWS, CHANNELS = 30, 5
integers, floats = jax.jit(_scatter_integers), jax.jit(_scatter)


def updates(
    seed: int, boxes: int = 40, *, rows: int = ROWS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices, weights (those of a bin sum to 1) and cotangents of very different size."""
    rng = np.random.default_rng(seed)
    shape = (boxes, 3, 3, 16)
    weights = rng.random(shape)
    weights /= weights.sum(axis=-1, keepdims=True)
    cotangent = (
        rng.normal(size=(*shape[:3], CHANNELS)) * 10.0 ** rng.uniform(-3, 3, shape[:3])[..., None]
    )
    indices = rng.integers(0, rows, shape).astype(np.int32)
    return indices, weights.astype(np.float32), cotangent.astype(np.float32)


NOTHING = jnp.zeros((ROWS, CHANNELS), jnp.float32)


@pytest.mark.parametrize("rows", [ROWS, 3, 1])
def test_sums_are_those_of_float64(rows: int) -> None:
    """Within 2^-20 of what comes together in the row, also if all of it does in one."""
    indices, weights, cotangent = updates(0, rows=rows)
    expected, mass = np.zeros((ROWS, CHANNELS)), np.zeros(ROWS)
    for place in np.ndindex(indices.shape):
        expected[indices[place]] += np.float64(weights[place]) * cotangent[place[:3]]
        mass[indices[place]] += weights[place]
    found = np.asarray(integers(NOTHING, indices, weights, cotangent))
    bound = 2.0**-20 * np.abs(cotangent).max() * np.maximum(mass, 1e-9)[:, None]
    assert (np.abs(found - expected) <= bound).all()
    assert not found[rows:].any()


def test_the_order_of_boxes_does_not_change_a_bit() -> None:
    """That of float sums does."""
    given, order = updates(1, boxes=400), np.random.default_rng(0).permutation(400)
    shuffled = [part[order] for part in given]
    np.testing.assert_array_equal(integers(NOTHING, *given), integers(NOTHING, *shuffled))
    assert (np.asarray(floats(NOTHING, *given)) != floats(NOTHING, *shuffled)).any()


def test_bfloat16_zeros_and_no_box() -> None:
    indices, weights, cotangent = updates(2)
    rounded = jnp.asarray(cotangent, jnp.bfloat16)
    found = integers(NOTHING, indices, weights, rounded)
    expected = integers(NOTHING, indices, weights, rounded.astype(jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    assert not np.asarray(integers(NOTHING, indices, weights, 0 * cotangent)).any()
    none = [part[:0] for part in (indices, weights, cotangent)]
    assert not np.asarray(integers(NOTHING, *none)).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(poison: float) -> None:
    indices, weights, cotangent = updates(3)
    cotangent[7, 1, 2, 3] = poison
    assert np.isnan(integers(NOTHING, indices, weights, cotangent)).any()
