"""A detector that sees perfectly: every connected component of a colour is an object, whose class
and score follow from the colour."""

from __future__ import annotations

import cv2
import numpy as np

from mrcnn_jax.inference.results import Detections
from mrcnn_jax.pixels.geometry import mask_box
from mrcnn_jax.pixels.rle import encoded

CATEGORIES = [(5, "disc"), (7, "bar"), (90, "ring")]


def seen(scene: np.ndarray) -> Detections:
    """The objects of a scene [H, W] of colours: class and score of each component of a colour."""
    found = []
    for colour in np.unique(scene[scene > 0]).tolist():
        count, parts = cv2.connectedComponents((scene == colour).astype(np.uint8), connectivity=4)
        for part in range(1, count):
            found.append((1 - colour / 1000, 1 + colour % 3, parts == part))
    found.sort(key=lambda item: -item[0])
    return Detections(
        size=scene.shape,
        boxes=np.array([mask_box(mask) for *_, mask in found], np.float64).reshape(-1, 4),
        labels=np.array([label for _, label, _ in found], np.int32),
        category_ids=tuple(CATEGORIES[label - 1][0] for _, label, _ in found),
        class_names=tuple(CATEGORIES[label - 1][1] for _, label, _ in found),
        scores=np.array([score for score, *_ in found], np.float32),
        masks=tuple(encoded(mask for *_, mask in found)),
    )


def as_set(found: Detections) -> set[tuple[object, ...]]:
    rows = zip(
        found.category_ids, found.class_names, found.scores, found.boxes, found.masks, strict=True
    )
    return {(i, n, float(s), tuple(b.tolist()), m["counts"]) for i, n, s, b, m in rows}
