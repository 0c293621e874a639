"""PointRend's operations on points of boxes (Kirillov et al. 2020).

A point is (x, y) in [0, 1] of its box; the centre of cell i of M lies at (i + 0.5) / M. Between the
border of a grid and the centres of its outermost cells the value is that of these cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from mrcnn_jax.ops.roi import weighted_gather
from mrcnn_jax.ops.roi_pool import in_cells


def sample_map(
    feature: Float[Array, "h w c"],
    boxes: Float32[Array, "n 4"],
    valid: Bool[Array, " n"],
    points: Float32[Array, "n q 2"],
    *,
    stride: int,
) -> Float[Array, "n q c"]:
    """Reads a feature map bilinearly at points of boxes.

    Boxes and points get no gradient. Invalid rows give exactly 0, and no gradient, whatever their
    boxes hold.

    Args:
        feature: the map, whose cells are `stride` pixels wide.
        boxes: boxes in pixels of the canvas.
        valid: which boxes exist.
        points: points in [0, 1] of each box.
        stride: width of a cell, in pixels.

    Returns:
        Features in the dtype of the map.
    """
    height, width, channels = feature.shape
    box = in_cells(boxes, valid, jnp.zeros(len(boxes), jnp.int32), (stride,))[:, None]
    at = box[..., :2] + points * (box[..., 2:] - box[..., :2])
    values = _bilinear(
        feature.reshape(-1, channels), jnp.zeros(len(boxes), jnp.int32), at, (height, width)
    )
    return jnp.where(valid[:, None, None], values, 0)


def sample_grids(
    grids: Float[Array, "n m m"], points: Float32[Array, "n q 2"]
) -> Float[Array, "n q"]:
    """Reads each box's own M x M grid at points of the box; differentiable in `grids`."""
    n, size, _ = grids.shape
    starts = jnp.arange(n, dtype=jnp.int32) * size**2
    return _bilinear(grids.reshape(-1, 1), starts, points * size, (size, size))[..., 0]


def _bilinear(
    table: Float[Array, "rows c"],
    starts: Int32[Array, " n"],
    at: Float32[Array, "n q 2"],
    sides: tuple[int, int],
) -> Float[Array, "n q c"]:
    """Reads a grid of `sides` = (h, w) cells per row, which begins at `starts` in the table.

    `at` is (x, y) in cells; cell i covers [i, i + 1).
    """
    last = jnp.array([[[sides[1] - 1, sides[0] - 1]]], jnp.int32)
    at = jnp.nan_to_num(jax.lax.stop_gradient(at))  # NaN comes from a model that diverged
    at = jnp.clip(at - 0.5, 0, last.astype(jnp.float32))
    low = jnp.floor(at).astype(jnp.int32)
    upper = at - low.astype(jnp.float32)
    # Each [n, q, 2]: lower and upper cell.
    x, y = jnp.moveaxis(jnp.stack([low, jnp.minimum(low + 1, last)], axis=-1), 2, 0)
    x_weight, y_weight = jnp.moveaxis(jnp.stack([1 - upper, upper], axis=-1), 2, 0)
    indices = starts[:, None, None, None] + y[..., :, None] * sides[1] + x[..., None, :]
    weights = y_weight[..., :, None] * x_weight[..., None, :]
    n, q = at.shape[:2]
    return weighted_gather(table, indices.reshape(n, q, 1, 4), weights.reshape(n, q, 1, 4))[:, :, 0]


def uncertain_points(
    key: PRNGKeyArray,
    logits: Float[Array, "n m m"],
    *,
    count: int,
    oversampling: int,
    uncertain_fraction: float,
) -> Float32[Array, "n count 2"]:
    """Draws random points of each box, most of them where its mask is uncertain.

    Of oversampling * count uniform points, the floor(count * uncertain_fraction) with a logit
    nearest to 0 are taken; the rest are uniform (PointRend, section 3.1).

    Args:
        logits: of the mask of each box.

    Returns:
        Points (x, y) in [0, 1] of the boxes.
    """
    uncertain = math.floor(count * uncertain_fraction + 1e-6)  # as in `sampling.sample`
    candidates_key, rest_key = jax.random.split(key)
    candidates = jax.random.uniform(
        candidates_key, (len(logits), oversampling * count, 2), jnp.float32
    )
    certainty = jnp.abs(sample_grids(jax.lax.stop_gradient(logits), candidates).astype(jnp.float32))
    _, chosen = jax.lax.top_k(-certainty, uncertain)
    rest = jax.random.uniform(rest_key, (len(logits), count - uncertain, 2), jnp.float32)
    return jnp.concatenate(
        [jnp.take_along_axis(candidates, chosen[..., None], axis=1), rest], axis=1
    )


def subdivide(
    logits: Float32[Array, "*n m m"],
    predict: Callable[[Float32[Array, "*n q 2"]], Float32[Array, "*n q"]],
    *,
    steps: int,
    count: int,
) -> Float32[Array, "*n m2 m2"]:
    """Doubles masks, each time predicting the most uncertain cells anew (PointRend, section 3.1).

    Args:
        logits: logits of the masks; 0 is their outline.
        predict: maps points, the centres of cells, to logits there.
        steps: number of bilinear doublings.
        count: cells with a logit nearest to 0 that are predicted anew, all where there are fewer.

    Returns:
        Logits of the masks, 2 ** steps times as wide and high.
    """
    for _ in range(steps):
        *rows, size, _ = logits.shape
        side = 2 * size
        flat = jax.image.resize(logits, (*rows, side, side), "linear").reshape(*rows, side * side)
        _, cells = jax.lax.top_k(-jnp.abs(flat), min(count, side * side))
        points = (
            jnp.stack([cells % side, cells // side], axis=-1).astype(jnp.float32) + 0.5
        ) / side
        logits = jnp.put_along_axis(flat, cells, predict(points), axis=-1, inplace=False).reshape(
            *rows, side, side
        )
    return logits
