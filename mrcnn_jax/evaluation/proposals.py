"""How many ground-truth boxes the proposals reach: recall, over all objects and by size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

# COCO's size classes by the area of the ground-truth box, in pixels of the frame the boxes are
# given in.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}


def recalled(
    proposals: Float[np.ndarray, "p 4"],
    ground_truth: Float[np.ndarray, "g 4"],
    *,
    iou: float = 0.5,
    limit: int = 50,
) -> Bool[np.ndarray, " g"]:
    """Which ground-truth boxes have an IoU of at least `iou` with one of the first `limit`
    proposals."""
    a, b = (
        np.asarray(proposals, np.float64)[:limit].reshape(-1, 1, 4),
        np.asarray(ground_truth, np.float64).reshape(1, -1, 4),
    )
    overlap = np.prod(
        np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0),
        axis=-1,
    )
    union = _areas(a) + _areas(b) - overlap
    return (overlap >= iou * np.maximum(union, np.finfo(np.float64).tiny)).any(
        axis=0
    )  # boxes without any area reach nothing


def proposal_recall(
    proposals: Sequence[Float[np.ndarray, "_ 4"]],
    ground_truths: Sequence[Float[np.ndarray, "_ 4"]],
    *,
    iou: float = 0.5,
    limit: int = 50,
) -> dict[str, float]:
    """Share of the ground-truth boxes of all images that some proposal reaches; several may be
    reached by one.

    Args:
        proposals: boxes (x1, y1, x2, y2) of each image, best first, in the frame of the ground
            truth.
        ground_truths: boxes of each image, crowds left out.
        iou: overlap from which on a box counts as reached.
        limit: proposals an image that count.

    Returns:
        `recall@<limit>` and `recall@<limit>/small`, `/medium`, `/large`; a key is left out if there
        is no ground-truth box for it.
    """
    found = [
        recalled(p, g, iou=iou, limit=limit) for p, g in zip(proposals, ground_truths, strict=True)
    ]
    hits = np.concatenate([*found, np.zeros(0, bool)])
    areas = np.concatenate(
        [*(_areas(np.asarray(g, np.float64).reshape(-1, 4)) for g in ground_truths), np.zeros(0)]
    )
    recall = {"": hits} | {
        f"/{name}": hits[(low <= areas) & (areas < high)] for name, (low, high) in SIZES.items()
    }
    return {
        f"recall@{limit}{name}": float(part.mean()) for name, part in recall.items() if part.size
    }


def _areas(boxes: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n"]:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
