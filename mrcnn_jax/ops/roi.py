"""Features of boxes: the FPN level rule, RoIAlign, RoIWarp, and the choice of these or RoIPool."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from mrcnn_jax.config.model import RoIConfig
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.ops.platforms import by_platform
from mrcnn_jax.ops.roi_pool import in_cells, quantise, roi_pool
from mrcnn_jax.ops.rows import fresh_zeros, valid_first


def roi_features(
    features: Sequence[Float[Array, "h_l w_l c"]],
    boxes: Float32[Array, "n 4"],
    valid: Bool[Array, " n"],
    *,
    levels: Int32[Array, " n"],
    strides: Sequence[int],
    output_size: int,
    config: RoIConfig,
    deterministic: bool = False,
) -> Float[Array, "n p p c"]:
    """Cuts P x P features for each box by `roi_align`, `roi_pool` or `roi_warp`, as `config` says.

    Boxes get no gradient. Invalid rows give exactly 0, and no gradient, whatever they hold.

    Args:
        features: maps [h_l, w_l, c]; a single map is a list of one.
        boxes: boxes in pixels of the canvas.
        valid: which boxes exist.
        levels: index into `features` for each box.
        strides: width of each map's cells, in pixels.
        output_size: P.
        config: operation and sampling.
        deterministic: align and warp on a GPU: sum the gradient so that it has the same bits
            whatever the order of the boxes.
    """
    place: dict[str, Any] = {"levels": levels, "strides": strides, "output_size": output_size}
    samples: dict[str, Any] = {
        "sampling_ratio": config.sampling_ratio,
        "max_sampling_ratio": config.max_sampling_ratio,
        "deterministic": deterministic,
    }
    match config.op:
        case "align":
            return roi_align(features, boxes, valid, **place, **samples, aligned=config.aligned)
        case "pool":
            return roi_pool(features, boxes, valid, **place)
        case "warp":
            return roi_warp(features, boxes, valid, **place, **samples)
        case _:
            assert_never(config.op)


def assign_levels(
    boxes: Float32[Array, "n 4"],
    *,
    canonical_size: float,
    canonical_level: int,
    min_level: int,
    max_level: int,
    epsilon: float = 0.0,
) -> Int32[Array, " n"]:
    """Assigns each box an FPN level (Lin et al. 2017, equation 1).

    That is floor(canonical_level + log2(sqrt(w h) / canonical_size) + epsilon), clamped. A box
    without area goes to `min_level`.

    Args:
        boxes: (x1, y1, x2, y2), pixels.
        canonical_size: side, in pixels, of the square box that `canonical_level` begins with.
        canonical_level: level of such a box.
        min_level: the finest level there is.
        max_level: the coarsest.
        epsilon: added before rounding down: boxes at a limit go to the coarser level.

    Returns:
        Numbers of levels, min_level..max_level.
    """
    # Level l begins at side canonical_size * 2^(l - canonical_level - epsilon). Counting the levels
    # that have begun is the same rule without a logarithm: exact at the limits, and defined for any
    # box.
    starts = canonical_size * 2.0 ** (
        np.arange(min_level + 1, max_level + 1) - canonical_level - epsilon
    )
    passed = box_ops.area(boxes)[:, None] >= jnp.array([starts**2], jnp.float32)
    return min_level + jnp.sum(passed, axis=1, dtype=jnp.int32)


def roi_align(
    features: Sequence[Float[Array, "h_l w_l c"]],
    boxes: Float32[Array, "n 4"],
    valid: Bool[Array, " n"],
    *,
    levels: Int32[Array, " n"],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool = True,
    max_sampling_ratio: int = RoIConfig.max_sampling_ratio,
    deterministic: bool = False,
) -> Float[Array, "n p p c"]:
    """Averages bilinear samples in each of P x P bins of each box (Mask R-CNN, section 3).

    Equal to torchvision's roi_align. A sample more than one cell centre outside of its map is 0;
    one nearer to it takes the value at the border. Coordinates and averages are float32, the result
    has the features' dtype. Other arguments, gradients and invalid rows: see `roi_features`.

    Args:
        sampling_ratio: samples per bin and axis. 0: as many as the bin has cells, rounded up; a box
            without area or turned inside out then gives 0.
        aligned: cells of a map are centred at (i + 0.5) * stride. False: at i * stride, and a box
            is at least one cell wide and high.
        max_sampling_ratio: limit if `sampling_ratio` is 0. The cost is that of as many samples in
            every bin.
        deterministic: see `roi_features`.
    """
    corners = in_cells(boxes, valid, levels, strides)
    if aligned:
        corners -= 0.5
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = jnp.maximum(extent, 1)
    return _average_samples(
        features,
        start,
        extent,
        valid,
        levels=levels,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        max_sampling_ratio=max_sampling_ratio,
        deterministic=deterministic,
    )


def roi_warp(
    features: Sequence[Float[Array, "h_l w_l c"]],
    boxes: Float32[Array, "n 4"],
    valid: Bool[Array, " n"],
    *,
    levels: Int32[Array, " n"],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    max_sampling_ratio: int = RoIConfig.max_sampling_ratio,
    deterministic: bool = False,
) -> Float[Array, "n p p c"]:
    """Averages samples as `roi_align` does, in boxes rounded to whole cells as `roi_pool` does.

    This is RoIWarp as Mask R-CNN, section 4.2, describes it. Cell i of a map covers [i, i + 1).
    """
    first, cells = quantise(in_cells(boxes, valid, levels, strides))
    start, extent = first.astype(jnp.float32) - 0.5, cells.astype(jnp.float32)
    return _average_samples(
        features,
        start,
        extent,
        valid,
        levels=levels,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        max_sampling_ratio=max_sampling_ratio,
        deterministic=deterministic,
    )


def _average_samples(
    features: Sequence[Float[Array, "h_l w_l c"]],
    start: Float32[Array, "n 2"],
    extent: Float32[Array, "n 2"],
    valid: Bool[Array, " n"],
    *,
    levels: Int32[Array, " n"],
    output_size: int,
    sampling_ratio: int,
    max_sampling_ratio: int,
    deterministic: bool,
) -> Float[Array, "n p p c"]:
    """Averages samples in bins of regions: (x, y) in cells, which are centred at integers."""
    samples = output_size, sampling_ratio, max_sampling_ratio
    levels = jnp.where(valid, levels, 0)
    grids = np.array([feature.shape[:2] for feature in features], np.int32)
    sides = jnp.array(grids)[levels]
    offset = jnp.array(np.cumsum(grids.prod(axis=1)) - grids.prod(axis=1), jnp.int32)[levels]

    x, x_weight = _axis_samples(start[:, 0], extent[:, 0], sides[:, 1], *samples)
    y, y_weight = _axis_samples(start[:, 1], extent[:, 1], sides[:, 0], *samples)
    row_start = offset[:, None, None] + y * sides[:, 1, None, None]
    # [n, p, p, 2 s, 2 s]: box, bin row, bin column, vertical cells, horizontal cells
    indices = row_start[:, :, None, :, None] + x[:, None, :, None, :]
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    weights = losses.zero_invalid(weights, valid)
    indices, weights = (part.reshape(*part.shape[:3], -1) for part in (indices, weights))
    # All levels in one table, so that a box reads from its level by an offset.
    table = jnp.concatenate([feature.reshape(-1, feature.shape[-1]) for feature in features])
    gathered = weighted_gather(table, indices, weights, deterministic)
    return jnp.where(valid[:, None, None, None], gathered, 0)


def _axis_samples(
    start: Float32[Array, " n"],
    extent: Float32[Array, " n"],
    cells: Int32[Array, " n"],
    output_size: int,
    sampling_ratio: int,
    max_sampling_ratio: int,
) -> tuple[Int32[Array, "n p k"], Float32[Array, "n p k"]]:
    """Returns the cells that each bin's samples read along one axis, and their weights.

    K = 2 s: the lower cells of the s samples, then the upper ones.
    """
    slots = jnp.arange(sampling_ratio or max_sampling_ratio, dtype=jnp.float32)[None]
    if sampling_ratio:
        count = jnp.full_like(extent, sampling_ratio)
    else:
        # ceil(extent / output_size) without the division: XLA rounds it differently where the
        # quotient is whole.
        count = jnp.sum(extent[:, None] > slots * output_size, axis=1, dtype=jnp.float32)
    used = slots < count[:, None]
    count = jnp.maximum(count, 1)[:, None, None]
    bins = jnp.arange(output_size, dtype=jnp.float32)[None, :, None] + (slots[None] + 0.5) / count
    at = start[:, None, None] + bins * extent[:, None, None] / output_size
    last = (cells - 1)[:, None, None]
    within = (at >= -1) & (at <= cells.astype(jnp.float32)[:, None, None])
    # NaN, from a model that diverged, is not within.
    at = jnp.clip(jnp.where(within, at, 0), 0, last.astype(jnp.float32))
    low = jnp.floor(at).astype(jnp.int32)
    upper = at - low.astype(jnp.float32)
    weight = jnp.where(
        jnp.tile(within & used[:, None], 2), jnp.concatenate([1 - upper, upper], axis=2) / count, 0
    )
    return jnp.concatenate([low, jnp.minimum(low + 1, last)], axis=2), weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def weighted_gather(
    table: Float[Array, "rows c"],
    indices: Int32[Array, "n p p t"],
    weights: Float32[Array, "n p p t"],
    deterministic: bool = False,
) -> Float[Array, "n p p c"]:
    """Returns the sum over t of weights[..., t] * table[indices[..., t]], summed in float32.

    Differentiable in `table` alone. The forward pass is T gathers that XLA fuses with their sum;
    the backward pass is one scatter-add, where autodiff would make T. On a CPU both go box by box
    if there is a backward pass. That stays in the caches: the backward pass is three times as fast.
    It also keeps XLA from computing the sum a second time for a convolution that reads it in
    another order, which it cannot do with the result of a loop.

    Args:
        table: rows.
        indices: of rows.
        weights: 0 .. 1, those of each sum at most 1 together.
        deterministic: on a GPU, sum the gradient in integers: the same bits in any order.
    """
    return _gather(table, indices, weights)


def _gather(table: Array, indices: Array, weights: Array) -> Array:
    total = jnp.zeros((*indices.shape[:-1], table.shape[-1]), jnp.float32)
    for term in range(indices.shape[-1]):
        total += weights[..., term, None] * table.at[indices[..., term]].get(
            mode="promise_in_bounds"
        ).astype(jnp.float32)
    return total.astype(table.dtype)


@jax.custom_batching.custom_vmap
def _gather_box_by_box(table: Array, indices: Array, weights: Array) -> Array:
    order, count = valid_first(jnp.any(weights != 0, axis=(1, 2, 3)))

    def add(i: Array, total: Array) -> Array:
        box = order[i]
        return total.at[box].set(_gather(table, indices[box], weights[box]))

    shape = jax.ShapeDtypeStruct((*indices.shape[:-1], table.shape[-1]), table.dtype)
    return jax.lax.fori_loop(0, count, add, fresh_zeros(shape, after=table))


@jax.custom_batching.custom_vmap
def _scatter_box_by_box(total: Array, indices: Array, weights: Array, cotangent: Array) -> Array:
    order, count = valid_first(jnp.any(weights != 0, axis=(1, 2, 3)))

    def add(i: Array, total: Array) -> Array:
        box = order[i]
        return _scatter(total, indices[box], weights[box], cotangent[box])

    return jax.lax.fori_loop(0, count, add, total)


def _as_one_image(function: Any) -> Callable[..., tuple[Array, bool]]:
    """A rule for a batch: all of its boxes go through one loop, on the rows of all its tables.

    In a loop over the boxes of each image at once, the image with most would set the number of
    turns.
    """

    def rule(size: int, batched: list[bool], table: Array, *boxes: Array) -> tuple[Array, bool]:
        if not batched[0]:
            table = jnp.broadcast_to(table, (size, *table.shape))
        boxes = tuple(
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(boxes, batched[1:], strict=True)
        )
        rows = table.shape[1]
        first = rows * jnp.arange(size, dtype=jnp.int32)
        boxes = (boxes[0] + first.reshape(-1, *(1,) * (boxes[0].ndim - 1)), *boxes[1:])
        result = function(
            table.reshape(-1, *table.shape[2:]), *(x.reshape(-1, *x.shape[2:]) for x in boxes)
        )
        return result.reshape(size, -1, *result.shape[1:]), True

    return rule


_gather_box_by_box.def_vmap(_as_one_image(_gather_box_by_box))
_scatter_box_by_box.def_vmap(_as_one_image(_scatter_box_by_box))


def _weighted_gather_forward(
    table: Array, indices: Array, weights: Array, deterministic: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    gathered = by_platform(table, indices, weights, cpu=_gather_box_by_box, default=_gather)
    # The backward pass reads only the table's shape and dtype: a jit does not keep its values.
    return gathered, (table, indices, weights)


def _weighted_gather_backward(
    deterministic: bool, residuals: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, None, None]:
    table, indices, weights = residuals
    # Float32 even for bfloat16 features: many samples fall into one cell.
    sums = jax.ShapeDtypeStruct(table.shape, jnp.float32)
    scatter = _scatter_integers if deterministic else _scatter

    def on_cpu(*boxes: Array) -> Array:
        return _scatter_box_by_box(fresh_zeros(sums, after=cotangent), *boxes)

    gradient = by_platform(
        indices,
        weights,
        cotangent,
        cpu=on_cpu,
        default=lambda *boxes: scatter(jnp.zeros(table.shape, jnp.float32), *boxes),
    )
    return gradient.astype(table.dtype), None, None


def _scatter(total: Array, indices: Array, weights: Array, cotangent: Array) -> Array:
    updates = weights[..., None] * cotangent.astype(jnp.float32)[..., None, :]
    return total.at[indices].add(updates, mode="promise_in_bounds")


def _scatter_integers(total: Array, indices: Array, weights: Array, cotangent: Array) -> Array:
    """`_scatter` to zeros by sums of integers, which are the same in any order.

    A float sum would be ordered by a sort of all updates, in 5 GiB of memory. Each row of `total`
    has a unit of its own: 2^-30 of the most that can come together in it, which is the sum of its
    weights, itself taken in integers, times the largest cotangent. If a cotangent is not finite,
    nothing is.
    """
    bins = math.prod(indices.shape[:-1])
    whole = 2.0 ** (30 - math.ceil(math.log2(max(bins, 1))))  # a weight of 1
    counted = jnp.zeros(len(total), jnp.int32)
    counted = counted.at[indices].add(
        jnp.ceil(weights * whole).astype(jnp.int32), mode="promise_in_bounds"
    )
    largest = jnp.max(jnp.abs(cotangent.astype(jnp.float32)), initial=0.0)
    most = counted.astype(jnp.float32) * (largest / whole)
    units = jnp.where(most > 0, 2.0**30 / jnp.where(most > 0, most, 1), 0)
    scaled = (weights * units[indices])[..., None] * cotangent.astype(jnp.float32)[..., None, :]
    sums = jnp.zeros(total.shape, jnp.int32)
    sums = sums.at[indices].add(jnp.round(scaled).astype(jnp.int32), mode="promise_in_bounds")
    sums = sums.astype(jnp.float32) / jnp.where(units > 0, units, 1)[:, None]
    return jnp.where(jnp.isfinite(largest), sums, jnp.nan)


weighted_gather.defvjp(_weighted_gather_forward, _weighted_gather_backward)
