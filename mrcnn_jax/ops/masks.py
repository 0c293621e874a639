"""Mask targets, from ground-truth masks stored as crops of their own box.

No mask of the size of the canvas ever reaches the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt8

_HALF = 127.5  # of a coverage of 0..255

_AxisCells = tuple[
    Bool[Array, "n s"], Int32[Array, "n s"], Int32[Array, "n s"], Float32[Array, "n s"]
]


def _axis_cells(
    points: Float32[Array, "n s"],
    gt_start: Float32[Array, " n"],
    gt_end: Float32[Array, " n"],
    cells: int,
) -> _AxisCells:
    """Locates sample points along one axis of a mask.

    Returns:
        Whether each is inside the ground-truth box; the two cells around it; weight of the second.
    """
    extent = (gt_end - gt_start)[:, None]
    position = (points - gt_start[:, None]) / jnp.where(extent > 0, extent, 1)
    inside = (extent > 0) & (position >= 0) & (position <= 1)  # False for NaN
    cell = jnp.clip(jnp.where(inside, position, 0) * cells - 0.5, 0, cells - 1)
    low = jnp.floor(cell).astype(jnp.int32)
    return inside, low, jnp.minimum(low + 1, cells - 1), cell - low.astype(jnp.float32)


def _coverage(
    masks: UInt8[Array, "g m m"], rows: Array, x: Sequence[Array], y: Sequence[Array]
) -> Float32[Array, "*points"]:
    """Returns the bilinear coverage at points, 0..255.

    `x` and `y` are results of `_axis_cells`, shaped to broadcast with `rows`, the masks' numbers.
    """
    (x_inside, x0, x1, fx), (y_inside, y0, y1, fy) = x, y

    def read(y: Array, x: Array) -> Array:
        return masks[rows, y, x].astype(jnp.float32)

    top = (1 - fx) * read(y0, x0) + fx * read(y0, x1)
    bottom = (1 - fx) * read(y1, x0) + fx * read(y1, x1)
    return jnp.where(x_inside & y_inside, (1 - fy) * top + fy * bottom, 0)


def crop_targets(
    masks: UInt8[Array, "g m m"],
    gt_boxes: Float32[Array, "g 4"],
    gt_index: Int32[Array, " n"],
    boxes: Float32[Array, "n 4"],
    *,
    size: int,
    soft: bool = False,
) -> Float32[Array, "n size size"]:
    """Crops each box's ground-truth mask to the box, as targets of size x size cells.

    Coverage is read bilinearly at the centres of the target's cells; at least half gives 1, less
    gives 0. Soft targets are the mean coverage of four points of each cell, as RoIAlign would cut
    them from the whole mask (He et al. 2017). Between the border of the ground-truth box and the
    centres of its outermost cells the coverage is that of these cells, and 0 outside the box. (A
    fade to 0 across the border would eat half a cell wherever those cells are covered in part.)

    Args:
        masks: coverage 0..255 of each object inside its own box, cells centred at (i + 0.5) / m of
            the box.
        gt_boxes: the objects' boxes, in pixels.
        gt_index: index of each box's object.
        boxes: the boxes to crop to, in pixels.
        size: side of the targets.
        soft: whether they are in 0..1, else 0 or 1.

    Returns:
        Targets. They are finite but mean nothing for boxes or objects that are invalid or have no
        area.
    """
    gt = gt_boxes[gt_index]
    cells = masks.shape[-1]
    points = 2 * size if soft else size
    fractions = (jnp.arange(points, dtype=jnp.float32) + 0.5)[None, :] / points
    at = (
        boxes[:, axis, None] + fractions * (boxes[:, axis + 2] - boxes[:, axis])[:, None]
        for axis in (0, 1)
    )
    x, y = (
        _axis_cells(points, gt[:, axis], gt[:, axis + 2], cells) for axis, points in enumerate(at)
    )
    coverage = _coverage(
        masks,
        gt_index[:, None, None],
        [part[:, None, :] for part in x],
        [part[:, :, None] for part in y],
    )
    if soft:
        return coverage.reshape(-1, size, 2, size, 2).mean((2, 4)) / 255
    return (coverage >= _HALF).astype(jnp.float32)


def point_targets(
    masks: UInt8[Array, "g m m"],
    gt_boxes: Float32[Array, "g 4"],
    gt_index: Int32[Array, " n"],
    boxes: Float32[Array, "n 4"],
    points: Float32[Array, "n q 2"],
) -> Float32[Array, "n q"]:
    """Reads targets of 0 or 1 as `crop_targets` does, at any points of the boxes.

    Args:
        masks, gt_boxes, gt_index, boxes: as in `crop_targets`.
        points: (x, y) in [0, 1] of each box.
    """
    gt = gt_boxes[gt_index]
    at = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])
    x, y = (
        _axis_cells(at[..., axis], gt[:, axis], gt[:, axis + 2], masks.shape[-1]) for axis in (0, 1)
    )
    return (_coverage(masks, gt_index[:, None], x, y) >= _HALF).astype(jnp.float32)


def area_outside(
    masks: UInt8[Array, "g m m"],
    gt_boxes: Float32[Array, "g 4"],
    gt_index: Int32[Array, " n"],
    boxes: Float32[Array, "n 4"],
    *,
    size: int,
) -> Float32[Array, " n"]:
    """The area of each box's object outside the box, in cells of size x size of the box.

    With c the coverage (0..1) of the cells of the object's own box, G the pixels of one of them, B
    those of a cell of the box, and x, y the shares of each column and row that are inside the box,
    it is the sum of c * (1 - x * y), times G / B.

    Args:
        masks, gt_boxes, gt_index, boxes: as in `crop_targets`.
        size: cells of the box along a side.

    Returns:
        Areas, exactly 0 where the box holds the object's. They are finite but mean nothing for
        boxes or objects that are invalid or have no area.
    """
    gt = gt_boxes[gt_index]
    cells = masks.shape[-1]
    starts = jnp.arange(cells, dtype=jnp.float32)[None, :]

    def inside(axis: int) -> Float32[Array, "n m"]:
        extent = gt[:, axis + 2] - gt[:, axis]
        extent = jnp.where(extent > 0, extent, 1)
        # Divided first: a side that both boxes share is exactly 0 or `cells`.
        low, high = ((boxes[:, i] - gt[:, axis]) / extent * cells for i in (axis, axis + 2))
        shared = jnp.minimum(high[:, None], starts + 1) - jnp.maximum(low[:, None], starts)
        return jnp.clip(shared, 0, 1)

    def cell_area(boxes: Float32[Array, "n 4"], side: int) -> Float32[Array, " n"]:
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / side**2
        return jnp.where(area > 0, area, 1)

    lost = 1 - inside(1)[:, :, None] * inside(0)[:, None, :]
    outside = jnp.sum(masks[gt_index].astype(jnp.float32) * lost, axis=(-2, -1)) / 255
    return outside * cell_area(gt, cells) / cell_area(boxes, size)
