"""Run an exported model with jax and NumPy alone.

The export command copies this file and pixels/geometry.py into the exported file, a zip from which
Python imports; mrcnn_jax is not needed to use it:

    import sys
    sys.path.append("model.jaxexport")  # last: nothing in the file may stand in for NumPy
    from mrcnn_exported import load

    found = load("model.jaxexport").predict(image)  # NumPy uint8 RGB [H, W, 3]

An exported file is a program: do not load one from somebody whose programs you would not run.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np

from mrcnn_jax.pixels.geometry import (
    check_image,
    depth_in_image,
    in_image,
    paste_region,
    resize,
    resize_plan,
)


def load(path: Any) -> ExportedModel:
    """Load an exported model.

    Raises:
        OSError, ValueError: `path` is not such a file, or a damaged one.
    """
    return ExportedModel(path)


DIGEST = 64  # hex digits of the SHA-256 of all bytes before them: the comment at the zip's end


def checked(path: Any) -> bytes:
    """Returns the content of an exported file; ValueError unless it is the bytes that were written.

    Python imports from a zip, and jax reads programs and weights, without noticing a flipped bit.
    """
    with open(path, "rb") as file:
        content = file.read()
    if hashlib.sha256(content[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
        raise ValueError(f"{path}: no exported file, or a damaged one: its SHA-256 differs")
    return content


class ExportedModel:
    """One program per canvas, for the platforms in `meta`; compiled when first needed."""

    def __init__(self, path: Any) -> None:
        import jax
        from jax import export

        with np.load(io.BytesIO(checked(path))) as archive:
            self.meta: dict[str, Any] = json.loads(archive["meta.json"])
            self._weights = jax.device_put(
                [archive[f"weights/{name}"] for name in self.meta["weights"]]
            )
            names = [f"programs/{height}x{width}" for height, width in self.meta["canvases"]]
            self._programs = [
                jax.jit(export.deserialize(bytearray(archive[name])).call) for name in names
            ]

    def predict(self, image: np.ndarray, min_score: float = 0.0) -> dict[str, Any]:
        """Detect the objects in an image.

        Args:
            image: uint8 RGB [H, W, 3].
            min_score: detections below it are left out.

        Returns:
            A dict of N detections, best first:
                boxes: float64 [N, 4], (x1, y1, x2, y2) in pixels, continuous in [0, W] x [0, H].
                labels: int32 [N], 1..K.
                category_ids: list of N COCO ids.
                class_names: list of N names.
                scores: float32 [N], probabilities.
                masks: bool [N, H, W].
            If the network has a depth head:
                depths: float32 [N], metres from the camera (median over the mask).
                depth_map: float32 [H, W], metres of each pixel, NaN where it is unknown.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        check_image(image)
        size = image.shape[0], image.shape[1]
        number, resized, scale = resize_plan(
            *size, self.meta["short_side"], self.meta["long_side"], self.meta["canvases"]
        )
        canvas = np.zeros((*self.meta["canvases"][number], 3), np.uint8)
        shrink = self.meta.get("shrink", "area")  # files without it are from before there were two
        canvas[: resized[0], : resized[1]] = resize(image, resized, shrink)
        seen = self._programs[number](self._weights, canvas, np.array(resized, np.int32))
        found = {name: np.asarray(value) for name, value in seen.items()}
        kept = found["valid"] & (found["scores"] >= min_score)
        boxes, clipped = in_image(found["boxes"][kept], scale, size)
        masks = np.zeros((len(boxes), *size), bool)
        for mask, probabilities, box in zip(masks, found["masks"][kept], boxes, strict=True):
            region, (y, x) = paste_region(probabilities, box, size, self.meta["paste"])
            mask[y : y + region.shape[0], x : x + region.shape[1]] = region
        labels = found["labels"][kept]
        categories = [self.meta["categories"][label - 1] for label in labels.tolist()]
        depth = {}
        if "depth" in found:
            of_canvas = found["depth"].ndim == 2
            depth["depth_map"], depth["depths"] = depth_in_image(
                found["depth"] if of_canvas else found["depth"][kept],
                found["masks"][kept],
                boxes,
                scale,
                size,
                stride=self.meta["depth_stride"],
                style=self.meta["paste"],
            )
        return depth | {
            "boxes": clipped,
            "labels": labels,
            "category_ids": [number for number, _ in categories],
            "class_names": [name for _, name in categories],
            "scores": found["scores"][kept],
            "masks": masks,
        }
