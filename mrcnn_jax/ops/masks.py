"""Mask targets, cut from ground-truth masks that travel as crops of their own box (no canvas-sized mask reaches the device)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt8


def _axis(
    start: Float32[Array, " n"],
    end: Float32[Array, " n"],
    gt_start: Float32[Array, " n"],
    gt_end: Float32[Array, " n"],
    size: int,
    cells: int,
) -> tuple[Bool[Array, "n s"], Int32[Array, "n s"], Int32[Array, "n s"], Float32[Array, "n s"]]:
    """Of the `size` sample points along one axis: inside the ground-truth box?, the two mask cells around it, weight of the second."""
    fractions = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    points = start[:, None] + fractions[None, :] * (end - start)[:, None]
    extent = (gt_end - gt_start)[:, None]
    position = (points - gt_start[:, None]) / jnp.where(extent > 0, extent, 1)
    inside = (extent > 0) & (position >= 0) & (position <= 1)  # False for NaN
    cell = jnp.clip(jnp.where(inside, position, 0) * cells - 0.5, 0, cells - 1)
    low = jnp.floor(cell).astype(jnp.int32)
    return inside, low, jnp.minimum(low + 1, cells - 1), cell - low.astype(jnp.float32)


def crop_targets(
    masks: UInt8[Array, "g m m"],
    gt_boxes: Float32[Array, "g 4"],
    gt_index: Int32[Array, " n"],
    boxes: Float32[Array, "n 4"],
    *,
    size: int,
) -> Float32[Array, "n size size"]:
    """The part of each box's ground-truth mask inside the box, as size x size targets, 0 or 1.

    `masks` is coverage 0..255 of the object inside its own box, with cell centres at (i + 0.5) / m of the box; `gt_index` names the
    mask of each box. Coverage is read bilinearly at the centres of the target's cells; at least half gives 1. Between the border
    of the ground-truth box and the centres of its outermost cells coverage is that of these cells; outside of the box it is 0. (A fade
    to 0 across the border would eat half a cell wherever those cells are covered in part.)

    Rows of no use (a box or a ground-truth box that is not valid, or without area) give finite values that mean nothing.
    """
    gt = gt_boxes[gt_index]
    cells = masks.shape[-1]
    x_inside, x0, x1, fx = _axis(boxes[:, 0], boxes[:, 2], gt[:, 0], gt[:, 2], size, cells)
    y_inside, y0, y1, fy = _axis(boxes[:, 1], boxes[:, 3], gt[:, 1], gt[:, 3], size, cells)

    def read(y: Int32[Array, "n s"], x: Int32[Array, "n s"]) -> Float32[Array, "n s s"]:
        return masks[gt_index[:, None, None], y[:, :, None], x[:, None, :]].astype(jnp.float32)

    fx, fy = fx[:, None, :], fy[:, :, None]
    top = (1 - fx) * read(y0, x0) + fx * read(y0, x1)
    bottom = (1 - fx) * read(y1, x0) + fx * read(y1, x1)
    coverage = (1 - fy) * top + fy * bottom
    inside = y_inside[:, :, None] & x_inside[:, None, :]
    return (inside & (coverage >= 127.5)).astype(jnp.float32)
