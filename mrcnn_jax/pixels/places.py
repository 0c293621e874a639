"""Boxes as four numbers: inside their image or not, in the place of their mask or not."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as rle_ops

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
RLE = dict[str, Any]  # {"size": [height, width], "counts": str}, compressed

# A box is far from its mask if a side is more than FAR_SIDE px off (less is rounding) and they
# overlap by less than FAR_IOU. On 7,000 of COCO's own masks this never happens.
FAR_IOU, FAR_SIDE = 0.5, 2.0
# From here on a box fits its mask: chance does not come that close, and of COCO's boxes 2 in 1,000
# fall below.
FIT_IOU = 0.8


def box_area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def clipped(box: Box, height: int, width: int) -> Box:
    """The part of a box that lies inside the image."""
    x1, y1, x2, y2 = box
    return (
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
        min(max(x2, 0.0), width),
        min(max(y2, 0.0), height),
    )


def far(box: Box, extent: Box, least: float = FAR_IOU) -> bool:
    """Whether a box is not that of its mask (see FAR_IOU)."""
    if _apart(box, extent) <= FAR_SIDE:
        return False
    overlap = max(0.0, min(box[2], extent[2]) - max(box[0], extent[0])) * max(
        0.0, min(box[3], extent[3]) - max(box[1], extent[1])
    )
    return overlap < least * (box_area(box) + box_area(extent) - overlap)


def _apart(a: Box, b: Box) -> float:
    """The largest distance of two sides."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]), abs(a[2] - b[2]), abs(a[3] - b[3]))


def mask_extent(rle: RLE | None) -> Box | None:
    """The box around a mask's pixels; None if there are none."""
    if rle is None:
        return None
    x, y, w, h = rle_ops.toBbox(rle).tolist()
    return (x, y, x + w, y + h) if w and h else None


def corners_of(bbox: Box) -> Box:
    """(x1, y1, x2, y2) of (x, y, width, height)."""
    x, y, w, h = bbox
    return x, y, x + w, y + h


def swapped(box: Box) -> Box:
    """A box with x and y exchanged."""
    return box[1], box[0], box[3], box[2]


def outside(box: Box, height: int, width: int) -> float:
    """How far a box reaches out of the image."""
    return max(-box[0], -box[1], box[2] - width, box[3] - height, 0.0)


def agrees(box: Box, rle: RLE | None, extent: Box | None, height: int, width: int) -> bool:
    """Whether a mask is usable and where its box is; a small object may have one without pixels."""
    if extent is None:
        return rle is not None and min(box[2] - box[0], box[3] - box[1]) <= FAR_SIDE
    return not far(clipped(box, height, width), extent)
