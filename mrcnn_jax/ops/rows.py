"""Heads on the rows of a padded set that exist: cost follows what is there, shapes stay static."""

from __future__ import annotations

import functools
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


def of_existing_rows(
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
    layout: list[Any] = []

    def compute(part: Rows) -> tuple[Rows, list[Array]]:
        found, pullback = jax.vjp(function, params, part)
        leaves, tree = jax.tree.flatten(pullback)
        known = jax.tree.leaves((params, part))
        given, places = len(known), []
        for leaf in leaves:
            # The very same array, not an equal one.
            at = next((i for i, other in enumerate(known) if other is leaf), len(known))
            known += [leaf] * (at == len(known))
            places.append(at)
        layout[:] = tree, tuple(places)
        return found, known[given:]

    found, kept = _stacked(compute, rows, exists)
    return found, (params, rows, exists, _Saved(kept, *layout))


def _backward(
    function: Function, residuals: tuple[Parameters, Rows, Array, _Saved], cotangent: Rows
) -> tuple[Parameters, Rows, None]:
    params, rows, exists, saved = residuals
    leaves, tree = jax.tree.flatten(rows)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    order, count = existing_first(exists)

    def add(turn: Array, total: tuple[Parameters, list[Array]]) -> tuple[Parameters, list[Array]]:
        at = order[turn]
        part, stacked, of_found = _at((rows, saved.stacked, cotangent), at)
        known = jax.tree.leaves((params, part, stacked))
        arrays = [known[place] for place in saved.places]
        of_params, of_part = jax.tree.unflatten(saved.pullback, arrays)(of_found)
        own = [x for x, keep in zip(jax.tree.leaves(of_part), floating, strict=True) if keep]
        return jax.tree.map(jnp.add, total[0], of_params), [
            x.at[at].set(new) for x, new in zip(total[1], own, strict=True)
        ]

    floats = [x for x, keep in zip(leaves, floating, strict=True) if keep]
    nothing = own_zeros((params, floats), after=jax.tree.leaves(cotangent)[0])
    of_params, of_floats = jax.lax.fori_loop(0, count, add, nothing)
    found = iter(of_floats)
    of_rows = [
        next(found) if keep else np.zeros(x.shape, jax.dtypes.float0)
        for x, keep in zip(leaves, floating, strict=True)
    ]
    return of_params, jax.tree.unflatten(tree, of_rows), None


_by_chunk.defvjp(_forward, _backward)


def _stacked(function: Callable[[Rows], Any], rows: Rows, exists: Array) -> Any:
    """Stacks the results of the chunks that exist, with 0 at the places of the others."""
    order, count = existing_first(exists)

    def compute(turn: Array, total: Any) -> Any:
        at = order[turn]
        return jax.tree.map(lambda x, new: x.at[at].set(new), total, function(_at(rows, at)))

    shapes = jax.eval_shape(lambda rows: function(_at(rows, 0)), rows)
    stacks = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(exists), *leaf.shape), leaf.dtype), shapes
    )
    nothing = own_zeros(stacks, after=jax.tree.leaves(rows)[0])
    return jax.lax.fori_loop(0, count, compute, nothing)


def own_zeros(like: T, *, after: Array) -> T:
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


def existing_first(exists: Bool[Array, " n"]) -> tuple[Int32[Array, " n"], Int32[Array, ""]]:
    """An order with what exists first, each part in its own order, and how many exist."""
    order = jnp.argsort(~exists, stable=True).astype(jnp.int32)
    return order, jnp.sum(exists, dtype=jnp.int32)


def _at(rows: Rows, at: Any) -> Rows:
    return jax.tree.map(lambda x: x[at], rows)
