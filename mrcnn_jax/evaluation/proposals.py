"""Recall of the proposals, over all objects and by size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

# COCO's size classes by the area of the ground-truth box, in pixels of the boxes' frame.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}


def recalled(
    proposals: Float[np.ndarray, "p 4"],
    ground_truth: Float[np.ndarray, "g 4"],
    *,
    iou: float = 0.5,
    limit: int = 50,
) -> Bool[np.ndarray, " g"]:
    """Find the ground-truth boxes that one of the first `limit` proposals reaches.

    Args:
        proposals: boxes (x1, y1, x2, y2), best first.
        ground_truth: boxes in the same frame.
        iou: least overlap at which a box counts as reached.
        limit: number of proposals that count.
    """
    a = np.asarray(proposals, np.float64)[:limit].reshape(-1, 1, 4)
    b = np.asarray(ground_truth, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.prod(np.maximum(sides, 0), axis=-1)
    # A union of 0 would let boxes without any area reach each other.
    union = np.maximum(_areas(a) + _areas(b) - overlap, np.finfo(np.float64).tiny)
    return (overlap >= iou * union).any(axis=0)


def proposal_recall(
    proposals: Sequence[Float[np.ndarray, "_ 4"]],
    ground_truths: Sequence[Float[np.ndarray, "_ 4"]],
    *,
    iou: float = 0.5,
    limit: int = 50,
) -> dict[str, float]:
    """Compute the share of the ground-truth boxes of all images that some proposal reaches.

    One proposal may reach several boxes.

    Args:
        proposals: boxes (x1, y1, x2, y2) of each image, best first, in the frame of the ground
            truth.
        ground_truths: boxes of each image, without crowds.
        iou: least overlap at which a box counts as reached.
        limit: number of proposals per image that count.

    Returns:
        `recall@<limit>` and `recall@<limit>/small`, `/medium`, `/large`, each only if there is a
        ground-truth box for it.
    """
    pairs = zip(proposals, ground_truths, strict=True)
    found = [recalled(p, g, iou=iou, limit=limit) for p, g in pairs]
    hits = np.concatenate([*found, np.zeros(0, bool)])
    boxes = [np.asarray(truth, np.float64).reshape(-1, 4) for truth in ground_truths]
    areas = _areas(np.concatenate([*boxes, np.zeros((0, 4))]))
    recall = {"": hits} | {
        f"/{name}": hits[(low <= areas) & (areas < high)] for name, (low, high) in SIZES.items()
    }
    return {
        f"recall@{limit}{name}": float(part.mean()) for name, part in recall.items() if part.size
    }


def _areas(boxes: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n"]:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
