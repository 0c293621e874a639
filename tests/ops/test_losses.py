from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.ops import losses


@pytest.mark.parametrize("beta", [1.0, 1 / 9, 0.0])
def test_smooth_l1_equals_loop(beta: float) -> None:
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 40)).astype(np.float32)
    pred[0] = target[0]
    expected = []
    for a, b in zip(pred.astype(float), target.astype(float), strict=True):
        d = abs(a - b)
        expected.append(d * d / (2 * beta) if d < beta else d - beta / 2)
    np.testing.assert_allclose(losses.smooth_l1(jnp.array(pred), jnp.array(target), beta=beta), expected, rtol=1e-5, atol=1e-7)


def test_smooth_l1_by_hand() -> None:
    values = losses.smooth_l1(jnp.array([0.0, 0.5, 3.0], jnp.float32), jnp.zeros(3, jnp.float32), beta=1.0)
    assert values.tolist() == [0, 0.125, 2.5]


def test_binary_cross_entropy_by_hand_and_at_the_ends() -> None:
    logits = jnp.array([0, 0, math.log(3), math.log(3), 1e4, -1e4, 1e4], jnp.float32)
    targets = jnp.array([0, 1, 1, 0, 1, 0, 0], jnp.float32)
    expected = [math.log(2), math.log(2), -math.log(0.75), -math.log(0.25), 0, 0, 1e4]
    np.testing.assert_allclose(losses.binary_cross_entropy(logits, targets), expected, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(losses.binary_cross_entropy(x, targets)))(logits)
    np.testing.assert_allclose(slope, [0.5, -0.5, -0.25, 0.75, 0, 0, 1], atol=1e-6)


def test_cross_entropy_equals_loop() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(scale=3, size=(9, 4)), rng.integers(0, 4, 9)
    expected = [math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(logits, labels, strict=True)]
    result = losses.cross_entropy(jnp.array(logits, jnp.float32), jnp.array(labels, jnp.int32))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_losses_are_float32_whatever_the_predictions_are() -> None:
    half, labels = jnp.ones((2, 3), jnp.bfloat16), jnp.array([0, 1], jnp.int32)
    assert losses.smooth_l1(half, jnp.zeros((2, 3), jnp.float32), beta=1.0).dtype == jnp.float32
    assert losses.binary_cross_entropy(half, jnp.zeros((2, 3), jnp.float32)).dtype == jnp.float32
    assert losses.cross_entropy(half, labels).dtype == jnp.float32
    assert losses.masked_mean(half, labels == 0).dtype == jnp.float32
    # 512 ones and more are beyond a sum in bfloat16.
    assert float(losses.masked_sum(jnp.ones(1001, jnp.bfloat16), jnp.ones(1001, bool))) == 1001


def test_masked_sums_by_hand() -> None:
    values = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.float32)
    where = jnp.array([True, False, True])
    assert float(losses.masked_sum(values, where)) == 14
    assert float(losses.masked_mean(values, where)) == 3.5
    assert float(losses.masked_mean(values, where, denominator=jnp.sum(where))) == 7
    assert float(losses.masked_mean(values, where, denominator=28)) == 0.5
    assert float(losses.masked_mean(values, values > 3)) == 5
    assert losses.keep(values, where).tolist() == [[1, 2], [0, 0], [5, 6]]


def test_a_mean_over_nothing_is_exactly_zero() -> None:
    values, nothing = jnp.full((3, 2), jnp.nan, jnp.float32), jnp.zeros(3, bool)
    for denominator in (None, 0, jnp.sum(nothing)):
        value, gradient = jax.value_and_grad(lambda v, d=denominator: losses.masked_mean(v, nothing, denominator=d))(values)
        assert float(value) == 0
        assert (np.asarray(gradient) == 0).all()
