"""Losses, element by element, and sums over the rows that exist.

The select-twice rule. The rows of a padded set that do not exist may hold anything, NaN included.
`where(valid, f(x), 0)` hides their value but not their gradient: the zero that flows back is
multiplied by f'(NaN) = NaN. So a row that does not exist is replaced before the formula (`keep`, or
`boxes.sanitize`) and left out after it (`masked_sum`, `masked_mean`):

    masked_sum(smooth_l1(keep(pred, valid), keep(target, valid), beta=1.0), valid)

Losses are float32 whatever the dtype of the predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Num

from mrcnn_jax.config.model import BoxLoss
from mrcnn_jax.ops import boxes as box_ops


def _like(where: Bool[Array, "*n"], values: Num[Array, "*n ..."]) -> Bool[Array, "*n ..."]:
    """`where`, given for the leading axes of `values`, spread over the others."""
    return jnp.broadcast_to(
        where.reshape(where.shape + (1,) * (values.ndim - where.ndim)), values.shape
    )


def keep(values: Num[Array, "*n ..."], where: Bool[Array, "*n"]) -> Num[Array, "*n ..."]:
    """`values`, and 0 in the rows (leading axes) where `where` is False; no gradient reaches
    those."""
    return jnp.where(_like(where, values), values, 0)


def smooth_l1(
    pred: Float[Array, "*n"], target: Float[Array, "*n"], *, beta: float
) -> Float32[Array, "*n"]:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, elementwise (Fast R-CNN, equation 3);
    L1 for beta 0."""
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
    """The loss of each row of predicted deltas.

    Args:
        pred: deltas as `boxes.encode` makes them, times `weights`.
        target: the same of the true boxes.
        kind: smooth_l1 (Fast R-CNN, equation 3) or l1: summed over the four deltas; giou: 1 - GIoU
            of the two decoded boxes, in [0, 2] (Rezatofighi et al. 2019), which ignores growth
            beyond `boxes.MAX_LOG_SCALE`.
        beta: of smooth_l1.
        weights: of the deltas; only giou reads them.
    """
    match kind:
        case "smooth_l1":
            return smooth_l1(pred, target, beta=beta).sum(-1)
        case "l1":
            return smooth_l1(pred, target, beta=0).sum(-1)
        case "giou":
            # Moving both boxes or scaling an axis of both leaves GIoU as it is: any anchor does,
            # and this one loses no digits.
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
    """-t log p - (1 - t) log(1 - p) for p = sigmoid(logits), elementwise, stable for any finite
    logit."""
    return optax.sigmoid_binary_cross_entropy(
        logits.astype(jnp.float32), targets.astype(jnp.float32)
    )


def focal(
    logits: Float[Array, "*n"], targets: Float[Array, "*n"], *, gamma: float, alpha: float
) -> Float32[Array, "*n"]:
    """-alpha_t (1 - p_t)^gamma log p_t for p = sigmoid(logits), elementwise, stable for any finite
    logit (Lin et al. 2017, equation 5).

    p_t is p where the target is 1 and 1 - p where it is 0; alpha_t is `alpha` and 1 - `alpha`
    there.
    """
    return optax.sigmoid_focal_loss(
        logits.astype(jnp.float32), targets.astype(jnp.float32), alpha=alpha, gamma=gamma
    )


def cross_entropy(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> Float32[Array, " n"]:
    """-log softmax(logits)[label] of each row; `labels` in 0..c-1."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def _with_background(logits: Float[Array, "*n k"]) -> Float32[Array, "*n k+1"]:
    """`logits` behind a background class of logit 0."""
    return jnp.pad(logits.astype(jnp.float32), [(0, 0)] * (logits.ndim - 1) + [(1, 0)])


def mask_cross_entropy(
    logits: Float[Array, "*n h w k"], targets: Float[Array, "*n h w"], labels: Int[Array, "*n"]
) -> Float32[Array, "*n h w"]:
    """Softmax cross-entropy of each pixel of a mask: its K classes compete, with the background as
    a further class of logit 0.

    This is the multinomial loss that the paper compares its own with (He et al. 2017, table 2b).

    Args:
        logits: of the classes 1..K.
        targets: masks in [0, 1]: 1 the object, 0 background, between them a mixture of both.
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
    """Probabilities of the classes 1..K as `mask_cross_entropy` trains them; the background has
    what they lack of 1."""
    return jax.nn.softmax(_with_background(logits), axis=-1)[..., 1:]


def masked_sum(values: Float[Array, "*n ..."], where: Bool[Array, "*n"]) -> Float32[Array, ""]:
    """Sum of `values` over the rows (leading axes) where `where` is True."""
    return jnp.sum(keep(values, where), dtype=jnp.float32)


def masked_mean(
    values: Float[Array, "*n ..."],
    where: Bool[Array, "*n"],
    denominator: Num[Array, ""] | int | None = None,
) -> Float32[Array, ""]:
    """`masked_sum` over `denominator`, a count: by default of the elements that were summed. A
    count of 0 gives exactly 0."""
    if denominator is None:
        denominator = jnp.sum(_like(where, values))
    # With a count of 0 nothing was summed: any positive denominator does.
    return masked_sum(values, where) / jnp.maximum(jnp.asarray(denominator).astype(jnp.float32), 1)
