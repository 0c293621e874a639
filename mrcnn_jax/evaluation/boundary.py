"""Boundary IoU and its AP (Cheng et al. 2021): how well the outlines of masks agree, however large
the masks are.

The boundary of a mask is those of its pixels that have one outside of it at most d pixels away
along either axis; beyond the image all is outside. d is 2 % of the image's diagonal, rounded, and
at least 1. A detection has, with an object, the IoU of the masks or that of their boundaries,
whichever is smaller; with a crowd, which has no outline to speak of, that of the masks.
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
    """The pixels of a mask (0 or 1) that have one outside of it, or of the array, at most
    `distance` pixels away along either axis."""
    bordered = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    # A square as a whole; OpenCV takes its border, beyond the zeros, for no end of the mask.
    return mask - cv2.erode(bordered, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]


def boundary_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """The boundary of a compressed RLE's mask as another one."""
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
    """pycocotools' evaluation of masks, of iouType "segm", with these IoUs."""

    def computeIoU(self, imgId: int, catId: int) -> Float[np.ndarray, "d g"] | list[Any]:  # noqa: N802, N803
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        key = imgId, catId
        objects, detections = self._gts[key], self._dts[key]
        # Asked for the boundaries' IoUs, it sorts and cuts the detections as it has for the masks'.
        for whole in (self._gts, self._dts):
            whole[key] = [
                {**one, "segmentation": boundary_rle(one["segmentation"])} for one in whole[key]
            ]
        boundaries = super().computeIoU(imgId, catId)
        self._gts[key], self._dts[key] = objects, detections
        crowd = np.array([bool(one["iscrowd"]) for one in objects])
        return np.where(crowd, ious, np.minimum(ious, boundaries))
