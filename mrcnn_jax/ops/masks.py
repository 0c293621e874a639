"""Mask targets, cut from ground-truth masks that travel as crops of their own box (no canvas-sized
mask reaches the device)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt8

_Axis = tuple[Bool[Array, "n s"], Int32[Array, "n s"], Int32[Array, "n s"], Float32[Array, "n s"]]


def _axis(
    points: Float32[Array, "n s"],
    gt_start: Float32[Array, " n"],
    gt_end: Float32[Array, " n"],
    cells: int,
) -> _Axis:
    """Of the sample points along one axis: inside the ground-truth box?, the two mask cells around
    it, weight of the second."""
    extent = (gt_end - gt_start)[:, None]
    position = (points - gt_start[:, None]) / jnp.where(extent > 0, extent, 1)
    inside = (extent > 0) & (position >= 0) & (position <= 1)  # False for NaN
    cell = jnp.clip(jnp.where(inside, position, 0) * cells - 0.5, 0, cells - 1)
    low = jnp.floor(cell).astype(jnp.int32)
    return inside, low, jnp.minimum(low + 1, cells - 1), cell - low.astype(jnp.float32)


def _covered(
    masks: UInt8[Array, "g m m"], rows: Array, x: Sequence[Array], y: Sequence[Array]
) -> Float32[Array, "*points"]:
    """1 where the bilinear coverage at the points of two `_axis`, shaped to broadcast with `rows`,
    is at least half; else 0."""
    (x_inside, x0, x1, fx), (y_inside, y0, y1, fy) = x, y

    def read(y: Array, x: Array) -> Array:
        return masks[rows, y, x].astype(jnp.float32)

    top = (1 - fx) * read(y0, x0) + fx * read(y0, x1)
    bottom = (1 - fx) * read(y1, x0) + fx * read(y1, x1)
    coverage = (1 - fy) * top + fy * bottom
    return (x_inside & y_inside & (coverage >= 127.5)).astype(jnp.float32)


def crop_targets(
    masks: UInt8[Array, "g m m"],
    gt_boxes: Float32[Array, "g 4"],
    gt_index: Int32[Array, " n"],
    boxes: Float32[Array, "n 4"],
    *,
    size: int,
) -> Float32[Array, "n size size"]:
    """The part of each box's ground-truth mask inside the box, as size x size targets, 0 or 1.

    `masks` is coverage 0..255 of the object inside its own box, with cell centres at (i + 0.5) / m
    of the box; `gt_index` names the mask of each box. Coverage is read bilinearly at the centres of
    the target's cells; at least half gives 1. Between the border of the ground-truth box and the
    centres of its outermost cells coverage is that of these cells; outside of the box it is 0. (A
    fade to 0 across the border would eat half a cell wherever those cells are covered in part.)

    Rows of no use (a box or a ground-truth box that is not valid, or without area) give finite
    values that mean nothing.
    """
    gt = gt_boxes[gt_index]
    cells = masks.shape[-1]
    fractions = (jnp.arange(size, dtype=jnp.float32) + 0.5)[None, :] / size
    at = (
        boxes[:, axis, None] + fractions * (boxes[:, axis + 2] - boxes[:, axis])[:, None]
        for axis in (0, 1)
    )
    x, y = (_axis(points, gt[:, axis], gt[:, axis + 2], cells) for axis, points in enumerate(at))
    return _covered(
        masks,
        gt_index[:, None, None],
        [part[:, None, :] for part in x],
        [part[:, :, None] for part in y],
    )


def point_targets(
    masks: UInt8[Array, "g m m"],
    gt_boxes: Float32[Array, "g 4"],
    gt_index: Int32[Array, " n"],
    boxes: Float32[Array, "n 4"],
    points: Float32[Array, "n q 2"],
) -> Float32[Array, "n q"]:
    """What `crop_targets` has at the centres of cells, at any points (x, y) in [0, 1] of the
    boxes."""
    gt = gt_boxes[gt_index]
    at = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])
    x, y = (_axis(at[..., axis], gt[:, axis], gt[:, axis + 2], masks.shape[-1]) for axis in (0, 1))
    return _covered(masks, gt_index[:, None], x, y)
