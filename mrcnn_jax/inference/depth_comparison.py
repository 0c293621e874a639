"""How far predicted depth is from the true one, over the pixels and the objects of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.data.records import ImageRecord
from mrcnn_jax.evaluation.depth_errors import DepthErrors, object_depth, object_figures
from mrcnn_jax.evaluation.matches import matched_pairs
from mrcnn_jax.pixels.rle import decoded

UNKNOWN = float("nan")


class DepthComparison:
    """Takes one image after another and keeps no pixels."""

    def __init__(self) -> None:
        self._errors = DepthErrors()
        # Index of an image -> predicted and true metres under the true mask of each annotation.
        self._objects: dict[int, Float64[np.ndarray, "n 2"]] = {}

    def add(
        self,
        index: int,
        image: ImageRecord,
        predicted: Float[np.ndarray, "h w"],
        true: Float[np.ndarray, "h w"] | None,
    ) -> None:
        """Compare the maps of an image.

        Args:
            index: of the image in its split.
            image: its annotations.
            predicted: metres, NaN where nothing was predicted.
            true: metres, 0 where unknown; None if the image has no map.
        """
        if true is None:
            return
        self._errors.add(predicted, true)
        pairs = []
        for record in image.annotations:
            pair = UNKNOWN, UNKNOWN
            if record.rle is not None and not record.iscrowd:
                (mask,) = decoded([record.rle], predicted.shape)
                pair = object_depth(predicted, mask), object_depth(true, mask)
            pairs.append(pair)
        self._objects[index] = np.array(pairs, np.float64).reshape(-1, 2)

    def packed(self) -> list[Any]:
        """What is known so far, for the `merge` of another process."""
        return [self._errors.packed(), list(self._objects.items())]

    def merge(self, packed: list[Any]) -> None:
        """Add the images of another, which was `packed`."""
        errors, objects = packed
        self._errors.merge(errors)
        self._objects |= dict(objects)

    def figures(
        self,
        images: Sequence[tuple[int, ImageRecord]],
        results: Sequence[dict[str, Any]],
        masks: COCOeval,
    ) -> dict[str, float]:
        """Compute the figures of all images so far.

        Args:
            images: (index, record) of the evaluated images, in the order of the ground truth.
            results: the detections that `masks` was made from, with their "depth".
            masks: matches of the masks (`average_precision.match_results`).

        Returns:
            Those of `DepthErrors`, and of `object_figures` for "depth/objects", the matched
            detections, and for "depth/true_masks", the predicted map under the true masks. {}
            without true depth.
        """
        pairs = [
            self._objects.get(index, np.full((len(image.annotations), 2), UNKNOWN))
            for index, image in images
        ]
        under_masks, true = np.concatenate([np.zeros((0, 2)), *pairs]).T
        matched = np.array(matched_pairs(masks), np.intp).reshape(-1, 2) - 1
        own = np.array([results[i].get("depth") or UNKNOWN for i in matched[:, 0]], np.float64)
        return (
            self._errors.figures()
            | object_figures(own, true[matched[:, 1]], "depth/objects")
            | object_figures(under_masks, true, "depth/true_masks")
        )
