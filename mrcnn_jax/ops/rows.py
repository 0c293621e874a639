"""Heads on the rows of a padded set that exist: cost follows what is there, shapes stay static."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from mrcnn_jax.ops.platforms import by_platform

Rows = Any  # a tree of arrays whose first axis is the same
Parameters = Any
Function = Callable[[Parameters, Rows], Rows]
T = TypeVar("T")


def apply_to_valid_rows(
    function: Function, params: Parameters, rows: Rows, valid: Bool[Array, " n"], *, chunk: int
) -> Rows:
    """Returns `function(params, rows)`, on a CPU computed only for chunks with a row that exists.

    A loop over these chunks has one copy of `function` and of its derivative, whatever the number
    of rows. On other platforms all rows are computed at once.

    Args:
        function: computes every row by itself.
        params: its first argument; floats.
        rows: its second argument, arrays [n, ...].
        valid: rows that exist. The cost is least if they come together.
        chunk: rows computed together.

    Returns:
        As of `function`. Rows that do not exist hold anything finite that it makes of them, or 0.
    """
    if len(valid) <= chunk:
        return function(params, rows)
    return by_platform(
        params,
        rows,
        cpu=lambda params, rows: _in_chunks(function, params, rows, valid, chunk),
        default=function,
    )


def _in_chunks(
    function: Function, params: Parameters, rows: Rows, valid: Bool[Array, " n"], chunk: int
) -> Rows:
    count = len(valid)
    chunks = -(-count // chunk)

    def cut(leaf: Array) -> Array:
        rest = [(0, chunks * chunk - count)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, rest).reshape(chunks, chunk, *leaf.shape[1:])

    found = _by_chunk(function, params, jax.tree.map(cut, rows), cut(valid).any(axis=1))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], found)


class _Saved(flax.struct.PyTreeNode):
    """What the backward pass of every chunk needs."""

    stacked: list[Array]  # [chunks, ...]
    pullback: Any = flax.struct.field(pytree_node=False)  # structure of the function of `jax.vjp`
    # The place of each of its arrays among the leaves of (params, rows of the chunk, stacked).
    places: tuple[int, ...] = flax.struct.field(pytree_node=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_chunk(
    function: Function, params: Parameters, rows: Rows, exists: Bool[Array, " chunks"]
) -> Rows:
    """`function` of each chunk that exists, 0 of the others; rows are [chunks, chunk, ...].

    The derivative is written by hand: that of a scan over conditions would store a copy of `params`
    for each chunk.
    """
    return _stacked(lambda part: function(params, part), rows, exists)


def _forward(
    function: Function, params: Parameters, rows: Rows, exists: Array
) -> tuple[Rows, tuple[Parameters, Rows, Array, _Saved]]:
    layout: list[Any] = []  # of the pullback's arrays, found as `compute` is traced

    def compute(part: Rows) -> tuple[Rows, list[Array]]:
        found, pullback = jax.vjp(function, params, part)
        leaves, tree = jax.tree.flatten(pullback)
        arrays = jax.tree.leaves((params, part))
        given, places = len(arrays), []
        for leaf in leaves:
            # The very same array, not an equal one.
            at = next((i for i, other in enumerate(arrays) if other is leaf), len(arrays))
            arrays += [leaf] * (at == len(arrays))
            places.append(at)
        layout[:] = tree, tuple(places)
        return found, arrays[given:]

    found, kept = _stacked(compute, rows, exists)
    return found, (params, rows, exists, _Saved(kept, *layout))


def _backward(
    function: Function, residuals: tuple[Parameters, Rows, Array, _Saved], cotangent: Rows
) -> tuple[Parameters, Rows, None]:
    params, rows, exists, saved = residuals
    leaves, tree = jax.tree.flatten(rows)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    order, count = valid_first(exists)

    def add(turn: Array, total: tuple[Parameters, list[Array]]) -> tuple[Parameters, list[Array]]:
        at = order[turn]
        part, stacked, part_cotangent = _at((rows, saved.stacked, cotangent), at)
        arrays = jax.tree.leaves((params, part, stacked))
        pullback = jax.tree.unflatten(saved.pullback, [arrays[place] for place in saved.places])
        params_gradient, part_gradient = pullback(part_cotangent)
        new_rows = list(itertools.compress(jax.tree.leaves(part_gradient), floating))
        return jax.tree.map(jnp.add, total[0], params_gradient), [
            x.at[at].set(new) for x, new in zip(total[1], new_rows, strict=True)
        ]

    floats = list(itertools.compress(leaves, floating))
    zeros = fresh_zeros((params, floats), after=jax.tree.leaves(cotangent)[0])
    params_gradient, float_gradients = jax.lax.fori_loop(0, count, add, zeros)
    remaining = iter(float_gradients)
    rows_gradient = [
        next(remaining) if is_float else np.zeros(x.shape, jax.dtypes.float0)
        for x, is_float in zip(leaves, floating, strict=True)
    ]
    return params_gradient, jax.tree.unflatten(tree, rows_gradient), None


_by_chunk.defvjp(_forward, _backward)


def _stacked(function: Callable[[Rows], Any], rows: Rows, exists: Array) -> Any:
    """Stacks the results of the chunks that exist, with 0 at the places of the others."""
    order, count = valid_first(exists)

    def compute(turn: Array, total: Any) -> Any:
        at = order[turn]
        return jax.tree.map(lambda x, new: x.at[at].set(new), total, function(_at(rows, at)))

    shapes = jax.eval_shape(lambda rows: function(_at(rows, 0)), rows)
    stacks = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(exists), *leaf.shape), leaf.dtype), shapes
    )
    zeros = fresh_zeros(stacks, after=jax.tree.leaves(rows)[0])
    return jax.lax.fori_loop(0, count, compute, zeros)


def fresh_zeros(like: T, *, after: Array) -> T:
    """Returns zeros in the shapes of `like` for a loop to write to, made once `after` is there.

    XLA merges equal constants. Zeros that two loops begin with would be made before the first one
    and be kept for the second, whatever memory is needed in between, and each loop copies them.
    """
    leaves, tree = jax.tree.flatten(like)
    zeros = []
    for leaf in leaves:
        zero, _ = jax.lax.optimization_barrier((jnp.zeros((), leaf.dtype), after))
        zeros.append(jnp.broadcast_to(zero, leaf.shape))
    return jax.tree.unflatten(tree, zeros)


def valid_first(exists: Bool[Array, " n"]) -> tuple[Int32[Array, " n"], Int32[Array, ""]]:
    """Returns an order with what exists first, each part in its own order, and how many exist."""
    order = jnp.argsort(~exists, stable=True).astype(jnp.int32)
    return order, jnp.sum(exists, dtype=jnp.int32)


def _at(rows: Rows, at: Any) -> Rows:
    return jax.tree.map(lambda x: x[at], rows)
