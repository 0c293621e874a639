"""RoIPool: maxima over bins of whole cells, of any size, at a static cost.

A bin may be one cell or the whole map, but shapes are static. So each map gets a pyramid of maxima
over windows of 1, 8, 32, 128, ... cells along each axis, and the maximum of a bin is that of a few
windows that cover it exactly. Windows may overlap: along 272 cells nine of them make any range, and
the pyramid holds 2.7 times the cells of the map.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from mrcnn_jax.ops import boxes as box_ops

# Coordinates are cut to this many cells: int32 holds no infinity, and the table of bin sizes below
# is finite.
_FURTHEST = 8192
_NOWHERE = np.iinfo(np.int32).max


def in_cells(
    boxes: Float32[Array, "n 4"],
    valid: Bool[Array, " n"],
    levels: Int32[Array, " n"],
    strides: Sequence[int],
) -> Float32[Array, "n 4"]:
    """Scales boxes to cells of their maps, without gradient; invalid rows become finite."""
    boxes = jax.lax.stop_gradient(box_ops.sanitize(boxes, valid))
    return boxes * jnp.array(1 / np.array(strides), jnp.float32)[jnp.where(valid, levels, 0), None]


def quantise(boxes: Float32[Array, "n 4"]) -> tuple[Int32[Array, "n 2"], Int32[Array, "n 2"]]:
    """Rounds boxes, given in cells, to whole cells (Fast R-CNN, as in torchvision).

    Corners are rounded, halves away from zero, and both corner cells belong to the box.

    Returns:
        First cell and number of cells, at least 1, along (x, y).
    """
    corners = jnp.nan_to_num(jax.lax.round(boxes))  # NaN comes from a model that diverged
    corners = jnp.clip(corners, -_FURTHEST, _FURTHEST).astype(jnp.int32)
    return corners[:, :2], jnp.maximum(corners[:, 2:] - corners[:, :2] + 1, 1)


def roi_pool(
    features: Sequence[Float[Array, "h_l w_l c"]],
    boxes: Float32[Array, "n 4"],
    valid: Bool[Array, " n"],
    *,
    levels: Int32[Array, " n"],
    strides: Sequence[int],
    output_size: int,
) -> Float[Array, "n p p c"]:
    """Takes the maximum over each of P x P bins of each box (Fast R-CNN, section 2.1).

    Boxes are rounded to whole cells, then their bins. Values and gradients are those of
    torchvision's roi_pool: bins overlap where the box is no multiple of P, are cut at the border of
    the map, and give 0 where nothing is left; the first of equal maxima, row by row, gets the
    gradient (accumulated in float32). Arguments, other gradients and invalid rows: see
    `roi.roi_features`.
    """
    first, cells = quantise(in_cells(boxes, valid, levels, strides))
    levels = jnp.where(valid, levels, 0)
    grids = np.array([feature.shape[:2] for feature in features], np.int32)
    sides = jnp.array(grids)[levels]
    left, right = _bins(first[:, 0], cells[:, 0], sides[:, 1], output_size)
    top, bottom = _bins(first[:, 1], cells[:, 1], sides[:, 0], output_size)

    windows = _windows(int(grids.max()))
    tallest, widest = (int(side) for side in grids.max(axis=0))
    y_level, y = _cover(top, bottom, windows, _cover_length(tallest))
    x_level, x = _cover(left, right, windows, _cover_length(widest))
    counts, starts = _layout(grids, windows)
    # [n, p, p, vertical windows, horizontal windows]
    y_level, y = y_level[:, :, None, :, None], y[:, :, None, :, None]
    x_level, x = x_level[:, None, :, None, :], x[:, None, :, None, :]
    level = levels[:, None, None, None, None]
    rows = (
        jnp.array(starts)[level, y_level, x_level] + y * jnp.array(counts[:, 1])[level, x_level] + x
    )

    pooled = _maximum(tuple(features), rows.reshape(*rows.shape[:3], -1))
    filled = valid[:, None, None] & (top < bottom)[:, :, None] & (left < right)[:, None, :]
    return jnp.where(filled[..., None], pooled, 0)


def _bins(
    first: Int32[Array, " n"], cells: Int32[Array, " n"], side: Int32[Array, " n"], output_size: int
) -> tuple[Int32[Array, "n p"], Int32[Array, "n p"]]:
    """Returns the first cell of each bin along one axis, and the one after its last, on the map."""
    # Which cells two bins share depends on the last bit of this quotient. A table has it rounded by
    # IEEE's rules, which XLA's division by a constant does not follow.
    quotients = np.arange(2 * _FURTHEST + 2, dtype=np.float32) / np.float32(output_size)
    size = jnp.array(quotients)[cells, None]
    edges = jnp.arange(output_size + 1, dtype=jnp.float32)[None]
    low = jnp.floor(edges[:, :-1] * size).astype(jnp.int32)
    high = jnp.ceil(edges[:, 1:] * size).astype(jnp.int32)
    return tuple(jnp.clip(first[:, None] + edge, 0, side[:, None]) for edge in (low, high))  # type: ignore[return-value]


class _Window(NamedTuple):
    """Windows of a level along one axis: window i covers `size` cells from i * `stride` on."""

    size: int
    stride: int


def _windows(side: int) -> list[_Window]:
    """Lists the levels over `side` cells: cells, then windows of 2 * 4^k every 4^k / 2 that fit."""
    windows = [_Window(1, 1)]
    while (size := 2 * 4 ** len(windows)) <= side:
        windows.append(_Window(size, size // 4))
    return windows


def _furthest(
    at: Any, low: Any, high: Any, windows: Sequence[_Window], xp: ModuleType
) -> tuple[Any, Any, Any]:
    """Finds the window inside [low, high), beginning at `at` or before, that ends last.

    Returns:
        Level, index and end; `xp` is the module to compute with, NumPy or jax.numpy.
    """
    level, index, end = xp.zeros_like(low), xp.zeros_like(low), low
    for k, (size, stride) in enumerate(windows):
        candidate = xp.minimum(at, high - size) // stride
        better = (candidate * stride >= low) & (candidate * stride + size > end)
        level, index = xp.where(better, k, level), xp.where(better, candidate, index)
        end = xp.where(better, candidate * stride + size, end)
    return level, index, end


def _cover(
    low: Int32[Array, "n p"], high: Int32[Array, "n p"], windows: Sequence[_Window], length: int
) -> tuple[Int32[Array, "n p t"], Int32[Array, "n p t"]]:
    """Covers [low, high) by `length` windows, always taking the one that reaches furthest.

    Returns:
        Levels and indices of the windows; any for an empty range.
    """
    at, cover = low, []
    for _ in range(length):
        level, index, at = _furthest(at, low, high, windows, jnp)
        cover.append((level, index))
    return tuple(jnp.stack(part, axis=-1) for part in zip(*cover, strict=True))  # type: ignore[return-value]


@functools.cache
def _cover_length(side: int) -> int:
    """Returns how many windows cover the worst range within `side` cells."""
    low, high = np.triu_indices(side + 1, 1)
    at, length = low, 0
    while (at < high).any():
        at, length = _furthest(at, low, high, _windows(side), np)[2], length + 1
    return length


def _layout(grids: np.ndarray, windows: Sequence[_Window]) -> tuple[np.ndarray, np.ndarray]:
    """Lays out the table of maxima.

    Returns:
        int32 numbers of windows [map, axis, level], and first rows [map, vertical level, horizontal
        level].
    """
    size, stride = np.array(windows, np.int32).T
    counts = np.maximum((grids[:, :, None] - size) // stride + 1, 0)
    rows = counts[:, 0, :, None] * counts[:, 1, None, :]
    return counts, (np.cumsum(rows) - rows.ravel()).reshape(rows.shape).astype(np.int32)


def _pyramid(
    features: Sequence[Float[Array, "h_l w_l c"]],
) -> tuple[Float[Array, "rows c"], Int32[Array, "rows c"]]:
    """Computes the maxima of all windows of all maps, in the order of `_layout`, and their cells.

    Of equal maxima the first cell counts, row by row.
    """
    grids = np.array([feature.shape[:2] for feature in features], np.int32)
    windows = _windows(int(grids.max()))
    counts, _ = _layout(grids, windows)
    tables = []
    for feature, count, offset in zip(
        features, counts, np.cumsum(grids.prod(axis=1)) - grids.prod(axis=1), strict=True
    ):
        cells = int(offset) + jnp.arange(feature.shape[0] * feature.shape[1], dtype=jnp.int32)
        column = (feature, jnp.broadcast_to(cells.reshape(*feature.shape[:2], 1), feature.shape))
        for ky in range(np.count_nonzero(count[0])):
            if ky > 0:
                column = _coarser(
                    *column,
                    axis=0,
                    fine=windows[ky - 1],
                    coarse=windows[ky],
                    count=int(count[0, ky]),
                )
            table = column
            for kx in range(np.count_nonzero(count[1])):
                if kx > 0:
                    table = _coarser(
                        *table,
                        axis=1,
                        fine=windows[kx - 1],
                        coarse=windows[kx],
                        count=int(count[1, kx]),
                    )
                tables.append(table)
    return tuple(
        jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in part])
        for part in zip(*tables, strict=True)
    )  # type: ignore[return-value]


def _coarser(
    values: Float[Array, "h w c"],
    cells: Int32[Array, "h w c"],
    *,
    axis: int,
    fine: _Window,
    coarse: _Window,
    count: int,
) -> tuple[Array, Array]:
    """Computes the maxima of the next level's `count` windows along `axis`, and their cells."""
    step = coarse.stride // fine.stride

    def parts(x: Array) -> list[Array]:
        firsts = range(0, coarse.size // fine.stride, fine.size // fine.stride)
        return [
            jax.lax.slice_in_dim(x, first, first + (count - 1) * step + 1, step, axis)
            for first in firsts
        ]

    maximum = functools.reduce(jnp.maximum, parts(values))
    return maximum, _first(maximum, parts(values), parts(cells))


def _first(maximum: Array, values: Sequence[Array], cells: Sequence[Array]) -> Array:
    """Returns the first of the `cells` whose value is the maximum; _NOWHERE if that is NaN."""
    return functools.reduce(
        jnp.minimum,
        [jnp.where(v == maximum, cell, _NOWHERE) for v, cell in zip(values, cells, strict=True)],
    )


def _pooled(
    features: Sequence[Float[Array, "h_l w_l c"]], rows: Int32[Array, "n p p t"]
) -> tuple[Array, Array]:
    """Returns the maximum over the t windows at `rows` of the table of maxima, and its cell."""
    values, cells = (
        [table.at[rows[..., term]].get(mode="promise_in_bounds") for term in range(rows.shape[-1])]
        for table in _pyramid(features)
    )
    maximum = functools.reduce(jnp.maximum, values)
    return maximum, _first(maximum, values, cells)


@jax.custom_vjp
def _maximum(
    features: tuple[Float[Array, "h_l w_l c"], ...], rows: Int32[Array, "n p p t"]
) -> Float[Array, "n p p c"]:
    """Returns the maxima of `_pooled`; differentiable in `features` alone, by one scatter-add.

    A jit without a backward pass never computes the cells.
    """
    return _pooled(features, rows)[0]


def _maximum_forward(
    features: tuple[Array, ...], rows: Array
) -> tuple[Array, tuple[tuple[Array, ...], Array]]:
    pooled, cells = _pooled(features, rows)
    # The backward pass reads only shapes and dtype of the features: a jit does not keep the values.
    return pooled, (features, cells)


def _maximum_backward(
    residuals: tuple[tuple[Array, ...], Array], cotangent: Array
) -> tuple[tuple[Array, ...], None]:
    features, cells = residuals
    sizes = [feature.shape[0] * feature.shape[1] for feature in features]
    channels = cotangent.shape[-1]
    # Float32 even for bfloat16 features: a cell may be the maximum of many bins.
    gradient = jnp.zeros((sum(sizes), channels), jnp.float32)
    gradient = gradient.at[cells, jnp.arange(channels)].add(
        cotangent.astype(jnp.float32), mode="drop"
    )
    parts = jnp.split(gradient, np.cumsum(sizes)[:-1])
    return tuple(
        part.reshape(feature.shape).astype(feature.dtype)
        for part, feature in zip(parts, features, strict=True)
    ), None


_maximum.defvjp(_maximum_forward, _maximum_backward)
