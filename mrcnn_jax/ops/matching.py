"""Which ground-truth box a box belongs to (thresholds are the stages' business)."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


@flax.struct.dataclass
class Matches:
    """The best ground-truth box of each row."""

    gt_index: Int32[Array, " n"]
    iou: Float32[Array, " n"]


def match(iou: Float32[Array, "n g"], gt_valid: Bool[Array, " g"]) -> Matches:
    """The valid ground-truth box of highest IoU of each row, the first of equals; index 0 and IoU 0
    if no box is valid."""
    candidates = jnp.where(gt_valid[None, :], iou, -1)
    return Matches(
        gt_index=jnp.argmax(candidates, axis=1).astype(jnp.int32),
        iou=jnp.maximum(jnp.max(candidates, axis=1), 0),
    )


def best_anchor_mask(
    iou: Float32[Array, "n g"], anchor_valid: Bool[Array, " n"], gt_valid: Bool[Array, " g"]
) -> Bool[Array, " n"]:
    """Anchors that are the best of some ground-truth box, ties included; none for a box that no
    valid anchor touches (IoU 0)."""
    candidates = jnp.where(anchor_valid[:, None] & gt_valid[None, :], iou, 0)
    best = jnp.max(candidates, axis=0, keepdims=True)
    return jnp.any((candidates == best) & (best > 0), axis=1)
