"""Detections of a batch -> COCO results: original image ids, category ids, pixels and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from mrcnn_jax.evaluation.masks import PasteStyle, paste_rle
from mrcnn_jax.structures import Instances


def coco_results(
    detections: Instances,
    *,
    scales: Float32[np.ndarray, "b 2"],
    original_sizes: Int32[np.ndarray, "b 2"],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    images_valid: Bool[np.ndarray, " b"],
    paste: PasteStyle,
) -> list[dict[str, Any]]:
    """COCO results of the valid detections of the valid images of a batch.

    Args:
        detections: NumPy leaves with a batch axis: boxes float32 in pixels of the canvas, labels 1..K, scores, valid, and masks (float32
            probabilities [B, N, M, M]) or None.
        scales: (y, x) of each image: canvas pixels = original pixels * scale.
        original_sizes: (height, width) of each image on disk.
        image_ids: COCO id of each image; what stands where an image is invalid is not read.
        category_ids: COCO category id of label 1, 2, ..., K.
        images_valid: False for images that only fill up the batch.
        paste: how masks become pixels (mrcnn_jax.evaluation.masks).

    Returns:
        One dict a detection, ready for JSON: image_id, category_id, bbox ([x, y, width, height] in pixels of the original image, clipped to
        it), score, and, with masks, segmentation (compressed RLE of the original image's size).
    """
    results: list[dict[str, Any]] = []
    for image in np.flatnonzero(images_valid).tolist():
        found: Instances = jax.tree.map(lambda field: field[image][detections.valid[image]], detections)  # noqa: B023
        assert found.labels is not None
        assert found.scores is not None
        height, width = original_sizes[image].tolist()
        boxes = np.asarray(found.boxes, np.float64) / np.tile(scales[image][::-1], 2)
        clipped = np.clip(boxes, 0, [width, height, width, height])
        for row, (x1, y1, x2, y2) in enumerate(clipped.tolist()):
            result: dict[str, Any] = {
                "image_id": int(image_ids[image]),
                "category_id": int(category_ids[int(found.labels[row]) - 1]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(found.scores[row]),
            }
            if found.masks is not None:
                # The box as it was: clipping it first would shift the mask inside it.
                result["segmentation"] = paste_rle(np.asarray(found.masks[row]), boxes[row], (height, width), paste)
            results.append(result)
    return results
