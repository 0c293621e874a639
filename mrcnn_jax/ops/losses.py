"""Losses, element by element, and sums over the rows that exist.

The select-twice rule. The rows of a padded set that do not exist may hold anything, NaN included. `where(valid, f(x), 0)` hides
their value but not their gradient: the zero that flows back is multiplied by f'(NaN) = NaN. So a row that does not exist is
replaced before the formula (`keep`, or `boxes.sanitize`) and left out after it (`masked_sum`, `masked_mean`):

    masked_sum(smooth_l1(keep(pred, valid), keep(target, valid), beta=1.0), valid)

Losses are float32 whatever the dtype of the predictions.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Num


def _like(where: Bool[Array, "*n"], values: Num[Array, "*n ..."]) -> Bool[Array, "*n ..."]:
    """`where`, given for the leading axes of `values`, spread over the others."""
    return jnp.broadcast_to(where.reshape(where.shape + (1,) * (values.ndim - where.ndim)), values.shape)


def keep(values: Num[Array, "*n ..."], where: Bool[Array, "*n"]) -> Num[Array, "*n ..."]:
    """`values`, and 0 in the rows (leading axes) where `where` is False; no gradient reaches those."""
    return jnp.where(_like(where, values), values, 0)


def smooth_l1(pred: Float[Array, "*n"], target: Float[Array, "*n"], *, beta: float) -> Float32[Array, "*n"]:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, elementwise (Fast R-CNN, equation 3); L1 for beta 0."""
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    if beta == 0:
        return jnp.abs(pred - target)
    return optax.huber_loss(pred, target, delta=beta) / beta


def binary_cross_entropy(logits: Float[Array, "*n"], targets: Float[Array, "*n"]) -> Float32[Array, "*n"]:
    """-t log p - (1 - t) log(1 - p) for p = sigmoid(logits), elementwise, stable for any finite logit."""
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))


def cross_entropy(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> Float32[Array, " n"]:
    """-log softmax(logits)[label] of each row; `labels` in 0..c-1."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def masked_sum(values: Float[Array, "*n ..."], where: Bool[Array, "*n"]) -> Float32[Array, ""]:
    """Sum of `values` over the rows (leading axes) where `where` is True."""
    return jnp.sum(keep(values, where), dtype=jnp.float32)


def masked_mean(
    values: Float[Array, "*n ..."], where: Bool[Array, "*n"], denominator: Num[Array, ""] | int | None = None
) -> Float32[Array, ""]:
    """`masked_sum` over `denominator`, a count: by default of the elements that were summed. A count of 0 gives exactly 0."""
    if denominator is None:
        denominator = jnp.sum(_like(where, values))
    # With a count of 0 nothing was summed: any positive denominator does.
    return masked_sum(values, where) / jnp.maximum(jnp.asarray(denominator).astype(jnp.float32), 1)
