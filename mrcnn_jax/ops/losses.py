"""Elementwise losses, and their sums over valid rows.

The select-twice rule: invalid rows of a padded set may hold anything, NaN included, and
`where(valid, f(x), 0)` hides their value but not their gradient, since the zero that flows back is
multiplied by f'(NaN) = NaN. So an invalid row is replaced before the formula (`zero_invalid`, or
`boxes.sanitize`) and left out after it (`masked_sum`, `masked_mean`):

    masked_sum(smooth_l1(zero_invalid(pred, valid), zero_invalid(target, valid), beta=1.0), valid)

Losses are float32 whatever the dtype of the predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Num

from mrcnn_jax.config.heads import BoxLoss
from mrcnn_jax.ops import boxes as box_ops


def _broadcast(where: Bool[Array, "*n"], values: Num[Array, "*n ..."]) -> Bool[Array, "*n ..."]:
    """Broadcasts `where`, given for the leading axes of `values`, over the others."""
    return jnp.broadcast_to(
        where.reshape(where.shape + (1,) * (values.ndim - where.ndim)), values.shape
    )


def zero_invalid(values: Num[Array, "*n ..."], valid: Bool[Array, "*n"]) -> Num[Array, "*n ..."]:
    """Zeroes the rows (leading axes) of `values` that are not valid; they get no gradient."""
    return jnp.where(_broadcast(valid, values), values, 0)


def smooth_l1(
    pred: Float[Array, "*n"], target: Float[Array, "*n"], *, beta: float
) -> Float32[Array, "*n"]:
    """Returns d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, elementwise; L1 for beta 0.

    This is equation 3 of Fast R-CNN, with d = pred - target.
    """
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    if beta == 0:
        return jnp.abs(pred - target)
    return optax.huber_loss(pred, target, delta=beta) / beta


def box_regression(
    pred: Float[Array, "*n 4"],
    target: Float[Array, "*n 4"],
    *,
    kind: BoxLoss,
    beta: float,
    weights: Sequence[float],
) -> Float32[Array, "*n"]:
    """Returns the loss of each row of predicted deltas.

    Args:
        pred: predicted deltas, as `boxes.encode` makes them.
        target: deltas of the true boxes.
        kind: smooth_l1 (Fast R-CNN, equation 3) and l1 are summed over the four deltas; giou is
            1 - GIoU of the decoded boxes, in [0, 2] (Rezatofighi et al. 2019), which does not see
            growth beyond `boxes.MAX_LOG_SCALE`.
        beta: where smooth_l1 turns linear.
        weights: factors that the deltas were encoded with; only giou reads them.
    """
    match kind:
        case "smooth_l1":
            return smooth_l1(pred, target, beta=beta).sum(-1)
        case "l1":
            return smooth_l1(pred, target, beta=0).sum(-1)
        case "giou":
            # GIoU does not change if both boxes are moved or an axis of both is scaled: any anchor
            # will do, and this one loses no digits.
            anchor = jnp.broadcast_to(jnp.array([-0.5, -0.5, 0.5, 0.5], jnp.float32), pred.shape)
            return 1 - box_ops.giou(
                box_ops.decode(pred, anchor, weights=weights),
                box_ops.decode(target, anchor, weights=weights),
            )
        case _:
            assert_never(kind)


def binary_cross_entropy(
    logits: Float[Array, "*n"], targets: Float[Array, "*n"]
) -> Float32[Array, "*n"]:
    """Returns -t log p - (1 - t) log(1 - p), p = sigmoid(logits), stable for any finite logit."""
    return optax.sigmoid_binary_cross_entropy(
        logits.astype(jnp.float32), targets.astype(jnp.float32)
    )


def focal(
    logits: Float[Array, "*n"], targets: Float[Array, "*n"], *, gamma: float, alpha: float
) -> Float32[Array, "*n"]:
    """Returns -alpha_t (1 - p_t)^gamma log p_t, elementwise, stable for any finite logit.

    With p = sigmoid(logits), p_t is p and alpha_t is `alpha` where the target is 1; where it is 0
    they are 1 - p and 1 - `alpha` (Lin et al. 2017, equation 5).
    """
    return optax.sigmoid_focal_loss(
        logits.astype(jnp.float32), targets.astype(jnp.float32), alpha=alpha, gamma=gamma
    )


def cross_entropy(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> Float32[Array, " n"]:
    """Returns -log softmax(logits)[label] of each row; `labels` in 0..c-1."""
    # Not by index: the gradient would be a sum into places.
    classes = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), classes)


def _with_background(logits: Float[Array, "*n k"]) -> Float32[Array, "*n k+1"]:
    """Prepends a background class of logit 0."""
    return jnp.pad(logits.astype(jnp.float32), [(0, 0)] * (logits.ndim - 1) + [(1, 0)])


def mask_cross_entropy(
    logits: Float[Array, "*n h w k"], targets: Float[Array, "*n h w"], labels: Int[Array, "*n"]
) -> Float32[Array, "*n h w"]:
    """Returns the softmax cross-entropy of each pixel, in which classes and background compete.

    This is the multinomial loss that the paper compares its own with (He et al. 2017, table 2b);
    the background's logit is 0.

    Args:
        logits: those of the classes 1..K.
        targets: masks in [0, 1]: 1 object, 0 background, in between a mixture of both.
        labels: class 1..K of each mask's object.
    """
    classes = logits.shape[-1] + 1
    share = targets.astype(jnp.float32)[..., None]
    object_class = jax.nn.one_hot(labels, classes, dtype=jnp.float32)[..., None, None, :]
    background = jax.nn.one_hot(jnp.zeros_like(labels), classes, dtype=jnp.float32)[
        ..., None, None, :
    ]
    return optax.softmax_cross_entropy(
        _with_background(logits), share * object_class + (1 - share) * background
    )


def mask_softmax(logits: Float[Array, "*n k"]) -> Float32[Array, "*n k"]:
    """Returns probabilities of the classes 1..K as trained by `mask_cross_entropy`.

    The background has the rest up to 1.
    """
    return jax.nn.softmax(_with_background(logits), axis=-1)[..., 1:]


def silog(
    differences: Float[Array, "b n"], where: Bool[Array, "b n"], *, lambda_: float
) -> Float32[Array, " b"]:
    """Returns the scale-invariant log loss of each row (Eigen et al. 2014, equation 4).

    It is mean(d^2) - lambda * mean(d)^2, computed as variance + (1 - lambda) * mean(d)^2. With
    lambda 1 a constant added to all d does not change it.

    Args:
        differences: d, predicted minus true log depths.
        where: the elements that count; a row without any gives 0.
        lambda_: in 0..1.
    """
    differences = zero_invalid(differences.astype(jnp.float32), where)
    mean = row_means(differences, where)
    variance = row_means(jnp.square(differences - mean[:, None]), where)
    return variance + (1 - lambda_) * jnp.square(mean)


def berhu(differences: Float[Array, "*n"], where: Bool[Array, "*n"]) -> Float32[Array, "*n"]:
    """Returns |d| up to c, and (d^2 + c^2) / (2 c) beyond (Laina et al. 2016, equation 1).

    Args:
        differences: d.
        where: the elements that count; c is a fifth of their largest |d|, a constant to the
            gradient.
    """
    size = jnp.abs(zero_invalid(differences.astype(jnp.float32), where))
    # If all are 0, none is beyond c, whatever it is.
    c = jnp.maximum(jax.lax.stop_gradient(size.max() / 5), jnp.finfo(jnp.float32).tiny)
    return jnp.where(size <= c, size, (jnp.square(size) / c + c) / 2)


def row_means(values: Float[Array, "b n"], where: Bool[Array, "b n"]) -> Float32[Array, " b"]:
    """Returns the mean of each row over the elements where `where` is True; 0 without any."""
    count = jnp.sum(where, axis=1, dtype=jnp.float32)
    return jnp.sum(zero_invalid(values, where), axis=1, dtype=jnp.float32) / jnp.maximum(count, 1)


def masked_sum(values: Float[Array, "*n ..."], where: Bool[Array, "*n"]) -> Float32[Array, ""]:
    """Sums `values` over the rows (leading axes) where `where` is True."""
    return jnp.sum(zero_invalid(values, where), dtype=jnp.float32)


def masked_mean(
    values: Float[Array, "*n ..."],
    where: Bool[Array, "*n"],
    denominator: Num[Array, ""] | int | None = None,
) -> Float32[Array, ""]:
    """Divides `masked_sum` by `denominator`, a count; by default that of the elements summed.

    A count of 0 gives exactly 0.
    """
    if denominator is None:
        denominator = jnp.sum(_broadcast(where, values))
    # With a count of 0 nothing was summed: any positive denominator will do.
    return masked_sum(values, where) / jnp.maximum(jnp.asarray(denominator).astype(jnp.float32), 1)
