"""Features of a box: the FPN level rule and RoIAlign."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from mrcnn_jax.ops import boxes as box_ops


def assign_levels(
    boxes: Float32[Array, "n 4"], *, canonical_size: float, canonical_level: int, min_level: int, max_level: int, epsilon: float = 0.0
) -> Int32[Array, " n"]:
    """FPN level of each box: floor(canonical_level + log2(sqrt(w h) / canonical_size)), clamped (FPN paper, equation 1).

    A box without area goes to `min_level`.
    """
    # Level l begins at side canonical_size * 2^(l - canonical_level): counting the beginnings that a box has passed is the same
    # rule without a logarithm, exact at the borders and defined for any box.
    starts = canonical_size * 2.0 ** (np.arange(min_level + 1, max_level + 1) - canonical_level - epsilon)
    passed = box_ops.area(boxes)[:, None] >= jnp.array([starts**2], jnp.float32)
    return min_level + jnp.sum(passed, axis=1, dtype=jnp.int32)


def roi_features(features, boxes, valid, *, levels, strides, output_size, config):  # type: ignore[no-untyped-def]
    """Temporary: replaced by the real switch."""
    return roi_align(
        features, boxes, valid, levels=levels, strides=strides, output_size=output_size, sampling_ratio=config.sampling_ratio,
        aligned=config.aligned,
    )  # fmt: skip


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
) -> Float[Array, "n p p c"]:
    """Average of sampling_ratio^2 bilinear samples in each of P x P bins of each box (Mask R-CNN, section 3).

    Pixel centres of a feature map lie at (i + 0.5) * stride ("aligned"). A sample more than one cell centre outside of its
    map gives 0, one less far outside the value at the border, as in torchvision. `levels` are indices into `features`, whose cells are
    `strides` pixels wide. Coordinates and the average are float32, the result has the features' dtype.

    Boxes get no gradient. Invalid rows give exactly 0, and no gradient, whatever they hold.
    """
    indices, weights = _samples(
        [feature.shape[:2] for feature in features],
        jax.lax.stop_gradient(box_ops.sanitize(boxes, valid)),
        jnp.where(valid, levels, 0),
        strides=strides,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    # All levels in one table, so that a box reads from its level by an offset.
    table = jnp.concatenate([feature.reshape(-1, feature.shape[-1]) for feature in features])
    return jnp.where(valid[:, None, None, None], _weighted_gather(table, indices, weights), 0)


def _samples(
    grids: Sequence[tuple[int, ...]],
    boxes: Float32[Array, "n 4"],
    levels: Int32[Array, " n"],
    *,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool = True,
) -> tuple[Int32[Array, "n p p t"], Float32[Array, "n p p t"]]:
    """Rows of the table of all levels and their weights: T = 4 sampling_ratio^2 of each bin, four corners a sample."""
    shape = jnp.array(grids, jnp.int32)[levels]
    offset = jnp.array(np.cumsum([0, *(h * w for h, w in grids)])[:-1], jnp.int32)[levels]
    stride = jnp.array(strides, jnp.float32)[levels]

    def axis(start: Float32[Array, " n"], end: Float32[Array, " n"], cells: Int32[Array, " n"]) -> tuple[Array, Array]:
        """Cells [n, p, 2 s] (the lower ones of each of s samples, then the upper ones) and their weights along one axis."""
        fractions = (np.arange(output_size)[:, None] + (np.arange(sampling_ratio) + 0.5) / sampling_ratio) / output_size  # [p, s]
        extent = (end - start) / stride
        if not aligned:
            extent = jnp.maximum(extent, 1)
        start, extent = (start / stride - (0.5 if aligned else 0.0))[:, None, None], extent[:, None, None]
        at = start + jnp.array(fractions[None], jnp.float32) * extent
        last = (cells - 1)[:, None, None]
        within = (at >= -1) & (at <= cells.astype(jnp.float32)[:, None, None])
        at = jnp.clip(jnp.where(within, at, 0), 0, last.astype(jnp.float32))  # NaN, of a model that diverged, is not within
        low = jnp.floor(at).astype(jnp.int32)
        upper = at - low.astype(jnp.float32)
        weight = jnp.where(jnp.tile(within, 2), jnp.concatenate([1 - upper, upper], axis=2), 0)
        return jnp.concatenate([low, jnp.minimum(low + 1, last)], axis=2), weight / sampling_ratio

    y, y_weight = axis(boxes[:, 1], boxes[:, 3], shape[:, 0])
    x, x_weight = axis(boxes[:, 0], boxes[:, 2], shape[:, 1])
    row_start = offset[:, None, None] + y * shape[:, 1, None, None]
    # [n, p, p, 2 s, 2 s]: box, bin row, bin column, vertical cells, horizontal cells
    indices = row_start[:, :, None, :, None] + x[:, None, :, None, :]
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    return indices.reshape(*indices.shape[:3], -1), weights.reshape(*weights.shape[:3], -1)


@jax.custom_vjp
def _weighted_gather(
    table: Float[Array, "rows c"], indices: Int32[Array, "n p p t"], weights: Float32[Array, "n p p t"]
) -> Float[Array, "n p p c"]:
    """Sum over t of weights[..., t] * table[indices[..., t]], in float32; differentiable in `table` alone.

    Forward, T gathers that XLA fuses with their sum. Backward, one scatter-add: autodiff makes T of them, three times as slow on a CPU.
    """
    total = jnp.zeros((*indices.shape[:-1], table.shape[-1]), jnp.float32)
    for term in range(indices.shape[-1]):
        total += weights[..., term, None] * table.at[indices[..., term]].get(mode="promise_in_bounds").astype(jnp.float32)
    return total.astype(table.dtype)


def _weighted_gather_forward(table: Array, indices: Array, weights: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    # The backward reads the table's shape and dtype only, so a jit does not keep its values.
    return _weighted_gather(table, indices, weights), (table, indices, weights)


def _weighted_gather_backward(residuals: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    table, indices, weights = residuals
    updates = weights[..., None] * cotangent.astype(jnp.float32)[..., None, :]
    # Float32 even for bfloat16 features: many samples fall into one cell.
    gradient = jnp.zeros(table.shape, jnp.float32).at[indices].add(updates, mode="promise_in_bounds")
    return gradient.astype(table.dtype), None, None


_weighted_gather.defvjp(_weighted_gather_forward, _weighted_gather_backward)
