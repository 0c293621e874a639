"""Heads on the rows of a padded set that exist: cost follows what is there, shapes stay static."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

Rows = Any  # a tree of arrays whose first axis is the same


def of_existing_rows(
    function: Callable[[Rows], Rows], rows: Rows, valid: Bool[Array, " n"], *, chunk: int
) -> Rows:
    """Returns `function(rows)`, on a CPU computed only for chunks that hold a row that exists.

    A loop over chunks of consecutive rows, each behind a condition, has one copy of `function` and
    of its derivative, whatever the number of rows. On other platforms all rows are computed at
    once.

    Args:
        function: computes every row by itself; its derivative may be taken.
        rows: its argument, arrays [n, ...].
        valid: rows that exist. The cost is least if they come first.
        chunk: rows computed together.

    Returns:
        As of `function`. Rows that do not exist hold anything finite that it makes of them, or 0.
    """
    if len(valid) <= chunk:
        return function(rows)
    return jax.lax.platform_dependent(
        rows,
        cpu=lambda rows: _in_chunks(function, rows, valid, chunk),
        default=function,
    )


def _in_chunks(
    function: Callable[[Rows], Rows], rows: Rows, valid: Bool[Array, " n"], chunk: int
) -> Rows:
    count = len(valid)
    chunks = -(-count // chunk)

    def cut(leaf: Array) -> Array:
        rest = [(0, chunks * chunk - count)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, rest).reshape(chunks, chunk, *leaf.shape[1:])

    def compute(_: None, part: tuple[Rows, Array]) -> tuple[None, Rows]:
        shapes = jax.eval_shape(function, part[0])

        def nothing(_: Rows) -> Rows:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return None, jax.lax.cond(part[1], function, nothing, part[0])

    parts = jax.tree.map(cut, rows), cut(valid).any(axis=1)
    _, found = jax.lax.scan(compute, None, parts)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], found)
