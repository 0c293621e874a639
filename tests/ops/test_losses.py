from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.config.heads import BoxLoss
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses

from .strategies import random_boxes

WEIGHTS = (10.0, 10.0, 5.0, 4.0)


def assert_equals_plain(loss: Callable, plain: Callable, predictions: np.ndarray) -> None:
    """Values, and gradients by autodiff, of a loss equal those of a plain formula in float64."""
    values, pull_back = jax.vjp(loss, jnp.array(predictions, jnp.float32))
    cotangent = np.random.default_rng(0).normal(size=values.shape)
    gradient = pull_back(jnp.array(cotangent, jnp.float32))[0]
    with jax.enable_x64(True):
        expected, pull_back = jax.vjp(plain, jnp.array(predictions, jnp.float64))
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            gradient, pull_back(jnp.array(cotangent))[0], rtol=1e-4, atol=1e-6
        )


def assert_finite(loss: Callable[[jax.Array], jax.Array], predictions: jax.Array) -> None:
    values, gradient = jax.vmap(jax.value_and_grad(lambda row: jnp.sum(loss(row))))(predictions)
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("beta", [1.0, 1 / 9, 0.0])
def test_smooth_l1_equals_loop(beta: float) -> None:
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 40)).astype(np.float32)
    pred[0] = target[0]
    expected = []
    for a, b in zip(pred.astype(float), target.astype(float), strict=True):
        d = abs(a - b)
        expected.append(d * d / (2 * beta) if d < beta else d - beta / 2)
    np.testing.assert_allclose(
        losses.smooth_l1(jnp.array(pred), jnp.array(target), beta=beta),
        expected,
        rtol=1e-5,
        atol=1e-7,
    )


def test_smooth_l1_by_hand() -> None:
    values = losses.smooth_l1(
        jnp.array([0.0, 0.5, 3.0], jnp.float32), jnp.zeros(3, jnp.float32), beta=1.0
    )
    assert values.tolist() == [0, 0.125, 2.5]


@pytest.mark.parametrize(("kind", "beta"), [("smooth_l1", 1.0), ("smooth_l1", 1 / 9), ("l1", 1.0)])
def test_box_regression_sums_over_the_deltas(kind: BoxLoss, beta: float) -> None:
    pred, target = np.random.default_rng(2).normal(size=(2, 5, 7, 4)).astype(np.float32)

    def plain(pred: jax.Array) -> jax.Array:
        d = jnp.abs(pred - target.astype(float))
        return (
            jnp.where(d < beta, d * d / (2 * beta), d - beta / 2) if kind == "smooth_l1" else d
        ).sum(-1)

    assert_equals_plain(
        lambda p: losses.box_regression(
            p, jnp.array(target), kind=kind, beta=beta, weights=WEIGHTS
        ),
        plain,
        pred,
    )


def giou_loss(pred: jax.Array, target: jax.Array) -> jax.Array:
    return losses.box_regression(pred, target, kind="giou", beta=1.0, weights=WEIGHTS)


def test_giou_loss_is_that_of_the_boxes_of_any_anchors() -> None:
    rng = np.random.default_rng(3)
    anchors, boxes = random_boxes(rng, 60).astype(float), random_boxes(rng, 60)
    target = np.asarray(
        box_ops.encode(jnp.array(boxes), jnp.array(anchors, jnp.float32), weights=WEIGHTS)
    )

    def plain(pred: jax.Array) -> jax.Array:
        dx, dy, dw, dh = (pred[:, i] / WEIGHTS[i] for i in range(4))
        xa, ya, xb, yb = anchors.T
        x, y, w, h = (
            (xa + xb) / 2 + dx * (xb - xa),
            (ya + yb) / 2 + dy * (yb - ya),
            jnp.exp(dw) * (xb - xa),
            jnp.exp(dh) * (yb - ya),
        )
        x1, y1, x2, y2 = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        u1, v1, u2, v2 = boxes.astype(float).T
        shared = jnp.maximum(jnp.minimum(x2, u2) - jnp.maximum(x1, u1), 0) * jnp.maximum(
            jnp.minimum(y2, v2) - jnp.maximum(y1, v1), 0
        )
        union = w * h + (u2 - u1) * (v2 - v1) - shared
        around = (jnp.maximum(x2, u2) - jnp.minimum(x1, u1)) * (
            jnp.maximum(y2, v2) - jnp.minimum(y1, v1)
        )
        return 1 - (shared / union - (around - union) / around)

    near = target + rng.normal(size=(60, 4))
    far = rng.normal(size=(60, 4)) * np.array(WEIGHTS)
    for pred in (near, far):
        assert_equals_plain(lambda p: giou_loss(p, jnp.array(target)), plain, pred)


def test_giou_loss_at_the_ends() -> None:
    ends = [0.0, 3, 1e6, -1e6]
    extreme = [
        [*shift, *size]
        for shift in ([0, 0], [1e6, 0], [1e6, -1e6])
        for size in ([a, b] for a in ends for b in ends)
    ]
    pred = jnp.array([*extreme, [0, 0, -120, -120], [1e20] * 4, [-1e20] * 4], jnp.float32)
    for target in (
        [0, 0, 0, 0],
        [3, -2, 1, 1],
        [0, 0, -1e6, -1e6],
        [0, 0, -120, -120],
        [0, 0, -120, 1e6],
        [1e6] * 4,
    ):
        others = jnp.broadcast_to(jnp.array(target, jnp.float32), pred.shape)
        assert_finite(lambda row, others=others: giou_loss(row, others[0]), pred)
        assert_finite(lambda row, others=others: giou_loss(others[0], row), pred)
        values = np.asarray(giou_loss(pred, others))
        assert (values >= 0).all()
        assert (values <= 2).all()
    same = giou_loss(pred[:1], pred[:1])
    assert same.tolist() == [0]
    growth = 5 * math.log(62.5), 4 * math.log(62.5)  # where decoding stops
    grown = jnp.array([[0, 0, 1e4, 1e4], [0, 0, *growth]], jnp.float32)
    np.testing.assert_allclose(
        giou_loss(grown, jnp.zeros((2, 4), jnp.float32)), 1 - 1 / 62.5**2, rtol=1e-5
    )


def test_binary_cross_entropy_by_hand_and_at_the_ends() -> None:
    logits = jnp.array([0, 0, math.log(3), math.log(3), 1e4, -1e4, 1e4], jnp.float32)
    targets = jnp.array([0, 1, 1, 0, 1, 0, 0], jnp.float32)
    expected = [math.log(2), math.log(2), -math.log(0.75), -math.log(0.25), 0, 0, 1e4]
    np.testing.assert_allclose(losses.binary_cross_entropy(logits, targets), expected, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(losses.binary_cross_entropy(x, targets)))(logits)
    np.testing.assert_allclose(slope, [0.5, -0.5, -0.25, 0.75, 0, 0, 1], atol=1e-6)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.5, 0.25), (1.0, 0.6), (0.0, 1.0)])
def test_focal_equals_plain(gamma: float, alpha: float) -> None:
    rng = np.random.default_rng(4)
    logits, targets = rng.uniform(-9, 9, (6, 50)), rng.integers(0, 2, (6, 50))

    def plain(logits: jax.Array) -> jax.Array:
        p = 1 / (1 + jnp.exp(-logits))
        p_t, alpha_t = jnp.where(targets == 1, p, 1 - p), np.where(targets == 1, alpha, 1 - alpha)
        return -alpha_t * (1 - p_t) ** gamma * jnp.log(p_t)

    assert_equals_plain(
        lambda x: losses.focal(x, jnp.array(targets, jnp.float32), gamma=gamma, alpha=alpha),
        plain,
        logits,
    )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
def test_focal_at_the_ends(gamma: float) -> None:
    logits = jnp.array([1e4, -1e4, 1e4, -1e4, 0], jnp.float32)
    targets = jnp.array([1, 1, 0, 0, 1], jnp.float32)

    def loss(x: jax.Array) -> jax.Array:
        return losses.focal(x, targets, gamma=gamma, alpha=0.25)

    np.testing.assert_allclose(
        loss(logits), [0, 2500, 7500, 0, 0.25 * 0.5**gamma * math.log(2)], rtol=1e-6
    )
    slope = jax.grad(lambda x: jnp.sum(loss(x)))(logits)
    np.testing.assert_allclose(slope[:4], [0, -0.25, 0.75, 0], atol=1e-6)
    # The weight of a pixel that is almost right: its gradient must not be that of a power at 0.
    assert_finite(
        lambda x: losses.focal(x, jnp.ones((), jnp.float32), gamma=gamma, alpha=0.25),
        jnp.linspace(-200, 200, 801, dtype=jnp.float32),
    )


def test_cross_entropy_equals_loop() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(scale=3, size=(9, 4)), rng.integers(0, 4, 9)
    expected = [
        math.log(sum(math.exp(x) for x in row)) - row[label]
        for row, label in zip(logits, labels, strict=True)
    ]
    result = losses.cross_entropy(jnp.array(logits, jnp.float32), jnp.array(labels, jnp.int32))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def plain_probabilities(logits: jax.Array) -> jax.Array:
    """Of the background and the classes: e^0 and e^logit over their sum."""
    powers = jnp.concatenate([jnp.ones_like(logits[..., :1]), jnp.exp(logits)], axis=-1)
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("hard", [True, False])
def test_mask_cross_entropy_equals_plain(hard: bool) -> None:
    rng = np.random.default_rng(5)
    logits, labels, targets = (
        rng.normal(size=(2, 3, 4, 5, 6)) * 3,
        rng.integers(1, 7, (2, 3)),
        rng.uniform(size=(2, 3, 4, 5)),
    )
    targets = (targets > 0.5).astype(float) if hard else targets

    def plain(logits: jax.Array) -> jax.Array:
        logs = jnp.log(plain_probabilities(logits))
        objects = jnp.stack(
            [
                jnp.stack([logs[b, s, :, :, label] for s, label in enumerate(row)])
                for b, row in enumerate(labels)
            ]
        )
        return -(targets * objects + (1 - targets) * logs[..., 0])

    arguments = jnp.array(targets, jnp.float32), jnp.array(labels, jnp.int32)
    assert_equals_plain(lambda x: losses.mask_cross_entropy(x, *arguments), plain, logits)


def test_mask_softmax_equals_plain() -> None:
    logits = np.random.default_rng(6).normal(size=(3, 4, 5, 6)) * 3
    assert_equals_plain(losses.mask_softmax, lambda x: plain_probabilities(x)[..., 1:], logits)


def test_mask_cross_entropy_by_hand_and_at_the_ends() -> None:
    logits = jnp.array([[0, 0], [1e4, 0], [-1e4, 0], [-1e4, -1e4], [1e4, 1e4]], jnp.float32)[
        None, :, None
    ]
    on, off = jnp.ones((1, 5, 1), jnp.float32), jnp.zeros((1, 5, 1), jnp.float32)
    first = jnp.array([1], jnp.int32)
    expected = [math.log(3), 0, 1e4 + math.log(2), 1e4, math.log(2)]
    np.testing.assert_allclose(
        losses.mask_cross_entropy(logits, on, first)[0, :, 0], expected, rtol=1e-6
    )
    expected = [math.log(3), 1e4, math.log(2), 0, 1e4 + math.log(2)]
    np.testing.assert_allclose(
        losses.mask_cross_entropy(logits, off, first)[0, :, 0], expected, rtol=1e-6
    )
    for target in (on, off, on / 4):
        assert_finite(
            lambda x, target=target: losses.mask_cross_entropy(x[None], target, first), logits
        )
    probabilities = losses.mask_softmax(logits)[0, :, 0]
    np.testing.assert_allclose(
        probabilities, [[1 / 3, 1 / 3], [1, 0], [0, 0.5], [0, 0], [0.5, 0.5]], atol=1e-6
    )


def test_losses_are_float32_whatever_the_predictions_are() -> None:
    half, labels = jnp.ones((2, 3), jnp.bfloat16), jnp.array([0, 1], jnp.int32)
    assert losses.smooth_l1(half, jnp.zeros((2, 3), jnp.float32), beta=1.0).dtype == jnp.float32
    assert losses.binary_cross_entropy(half, jnp.zeros((2, 3), jnp.float32)).dtype == jnp.float32
    assert losses.cross_entropy(half, labels).dtype == jnp.float32
    assert (
        losses.focal(half, jnp.zeros((2, 3), jnp.float32), gamma=2.0, alpha=0.25).dtype
        == jnp.float32
    )
    deltas = jnp.ones((2, 4), jnp.bfloat16)
    kinds: tuple[BoxLoss, ...] = ("smooth_l1", "l1", "giou")
    assert {
        losses.box_regression(deltas, deltas, kind=kind, beta=1.0, weights=WEIGHTS).dtype
        for kind in kinds
    } == {jnp.dtype("float32")}
    pixels = jnp.ones((2, 1, 1, 3), jnp.bfloat16)
    assert (
        losses.mask_cross_entropy(pixels, jnp.ones((2, 1, 1), jnp.bfloat16), labels).dtype
        == jnp.float32
    )
    assert losses.mask_softmax(pixels).dtype == jnp.float32
    assert losses.masked_mean(half, labels == 0).dtype == jnp.float32
    # 512 ones and more are beyond a sum in bfloat16.
    assert float(losses.masked_sum(jnp.ones(1001, jnp.bfloat16), jnp.ones(1001, bool))) == 1001


def test_silog_of_far_off_depths_keeps_its_digits() -> None:
    """All log depths 100 too large: with lambda 1 the variance is left, with .85 also .15 of the
    squared mean."""
    rng = np.random.default_rng(5)
    differences = (100 + rng.normal(scale=0.01, size=(2, 500))).astype(np.float32)
    where = rng.random((2, 500)) < 0.7
    for lambda_ in (1.0, 0.85):
        found = losses.silog(jnp.array(differences), jnp.array(where), lambda_=lambda_)
        for row, counts, loss in zip(differences.astype(np.float64), where, found, strict=True):
            d = row[counts]
            expected = np.square(d - d.mean()).mean() + (1 - lambda_) * d.mean() ** 2
            np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_masked_sums_by_hand() -> None:
    values = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.float32)
    where = jnp.array([True, False, True])
    assert float(losses.masked_sum(values, where)) == 14
    assert float(losses.masked_mean(values, where)) == 3.5
    assert float(losses.masked_mean(values, where, denominator=jnp.sum(where))) == 7
    assert float(losses.masked_mean(values, where, denominator=28)) == 0.5
    assert float(losses.masked_mean(values, values > 3)) == 5
    assert losses.zero_invalid(values, where).tolist() == [[1, 2], [0, 0], [5, 6]]


def test_a_mean_over_nothing_is_exactly_zero() -> None:
    values, nothing = jnp.full((3, 2), jnp.nan, jnp.float32), jnp.zeros(3, bool)
    for denominator in (None, 0, jnp.sum(nothing)):
        value, gradient = jax.value_and_grad(
            lambda v, d=denominator: losses.masked_mean(v, nothing, denominator=d)
        )(values)
        assert float(value) == 0
        assert (np.asarray(gradient) == 0).all()
