"""Matching of boxes to ground truth; thresholds are up to the stages."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


@flax.struct.dataclass
class Matches:
    """Index and IoU of the best ground-truth box of each row."""

    gt_index: Int32[Array, " n"]
    iou: Float32[Array, " n"]


def match(iou: Float32[Array, "n g"], gt_valid: Bool[Array, " g"]) -> Matches:
    """Finds the valid ground-truth box of highest IoU for each row, the first of equals.

    Without a valid ground-truth box, index and IoU are 0.
    """
    candidates = jnp.where(gt_valid[None, :], iou, -1)
    return Matches(
        gt_index=jnp.argmax(candidates, axis=1).astype(jnp.int32),
        iou=jnp.maximum(jnp.max(candidates, axis=1), 0),
    )


def best_anchor_mask(
    iou: Float32[Array, "n g"], anchor_valid: Bool[Array, " n"], gt_valid: Bool[Array, " g"]
) -> Bool[Array, " n"]:
    """Marks the anchors that are the best of some ground-truth box, ties included.

    torchvision and detectron2 call these low-quality matches. A box that no valid anchor touches
    (IoU 0) has none.

    Args:
        iou: of each anchor with each ground-truth box.
        anchor_valid: anchors that take part.
        gt_valid: ground-truth boxes that exist.

    Returns:
        Whether an anchor is such a best one.
    """
    candidates = jnp.where(anchor_valid[:, None] & gt_valid[None, :], iou, 0)
    best = jnp.max(candidates, axis=0, keepdims=True)
    return jnp.any((candidates == best) & (best > 0), axis=1)
