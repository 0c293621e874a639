"""What a class-specific head says of each box's own class."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32, Num


def select_class(
    values: Num[Array, "*n ..."], labels: Int32[Array, "*n"], axis: int = -1
) -> Num[Array, "*n ..."]:
    """Selects the value of each row's class.

    Not by index: the gradient would be a scatter-add.

    Args:
        values: one per class 1..K along `axis`, which follows the axes of `labels`; one alone is
            that of all classes (a class-agnostic head).
        labels: 1..K; any other label is clipped to them.
        axis: of the classes.

    Returns:
        `values` without `axis`.
    """
    count = values.shape[axis]
    if count == 1:
        return jnp.squeeze(values, axis)
    index = jnp.clip(labels - 1, 0, count - 1)
    index = index.reshape(*labels.shape, *(1,) * (values.ndim - labels.ndim))
    shape = [1] * values.ndim
    shape[axis] = count
    classes = jnp.arange(count, dtype=jnp.int32).reshape(shape)
    own = jnp.broadcast_to(index == classes, values.shape)
    return jnp.sum(jnp.where(own, values, 0), axis=axis)
