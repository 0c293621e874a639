"""Boundary IoU and its AP (Cheng et al. 2021): how well outlines agree, however large the masks.

The boundary of a mask is those of its pixels that have a pixel outside the mask at most d pixels
away along either axis; beyond the image everything is outside. d is 2 % of the image's diagonal,
rounded, and at least 1. A detection and an object have the IoU of their masks or that of their
boundaries, whichever is smaller; a crowd has no meaningful outline: with it, that of the masks.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

DILATION = 0.02  # of the image's diagonal


def mask_boundary(mask: UInt8[np.ndarray, "h w"], distance: int) -> UInt8[np.ndarray, "h w"]:
    """Keep the pixels of a mask (0 or 1) within `distance` of its outside, or of the array's."""
    bordered = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    # Repeated, the small square erodes by `distance`; OpenCV does not erode from an array's border.
    return mask - cv2.erode(bordered, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]


def boundary_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """The boundary of a mask, both as compressed RLEs."""
    height, width = rle["size"]
    distance = max(round(DILATION * float(np.hypot(height, width))), 1)
    mask = coco_mask.decode(rle)
    x, y, w, h = (int(side) for side in coco_mask.toBbox(rle))
    if w and h:  # around the box there is nothing to erode
        mask[y : y + h, x : x + w] = mask_boundary(
            np.ascontiguousarray(mask[y : y + h, x : x + w]), distance
        )
    return coco_mask.encode(mask)


class BoundaryEval(COCOeval):
    """pycocotools' evaluation of masks (iouType "segm") with boundary IoUs."""

    def computeIoU(self, imgId: int, catId: int) -> Float[np.ndarray, "d g"] | list[Any]:  # noqa: N802, N803
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        key = imgId, catId
        objects, detections = self._gts[key], self._dts[key]
        # The second call sorts and cuts the detections in the same way as the first.
        for whole in (self._gts, self._dts):
            whole[key] = [
                {**one, "segmentation": boundary_rle(one["segmentation"])} for one in whole[key]
            ]
        boundaries = super().computeIoU(imgId, catId)
        self._gts[key], self._dts[key] = objects, detections
        crowd = np.array([bool(one["iscrowd"]) for one in objects])
        return np.where(crowd, ious, np.minimum(ious, boundaries))
