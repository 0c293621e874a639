"""One raw annotation -> `ObjectRecord`: its box, polygons and run lengths are checked and, where
possible, repaired.

pycocotools trusts its input: a wrong length reads or writes beyond its buffers, and a far point
takes any amount of memory. Everything is therefore checked before it gets there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.json_values import has_constant, integer, is_number, short
from mrcnn_jax.data.records import RLE, Box, ObjectRecord, box_area
from mrcnn_jax.data.report import Reason
from mrcnn_jax.pixels.rle import decompressed

Note = Callable[[Reason], object]  # counts a reason for the annotation at hand

MIN_SIDE = 0.1  # px: a box with a shorter side is degenerate
# A box is far from its mask if a side is more than FAR_SIDE px off (less is rounding) and they
# overlap by less than FAR_IOU. On 7,000 of COCO's own masks this never happens.
FAR_IOU, FAR_SIDE = 0.5, 2.0
# px: no real polygon has a longer outline, and pycocotools would need 80 bytes for each pixel of it
OUTLINE = 3.2e6


class Dropped(Exception):
    """An image or annotation is unusable, for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


def object_record(
    raw: dict[str, Any], label: int, height: int, width: int, note: Note, formats: BoxFormats
) -> ObjectRecord:
    """The checked record of an annotation in an image of height x width.

    Reasons for repairs go to `note`, the box as written to `formats`. Raises Dropped if the
    annotation is unusable, ConfigError, without the file's name, if the whole file is.
    """
    rle = mask_rle(raw.get("segmentation"), height, width, note)
    iscrowd = raw.get("iscrowd") or 0
    if iscrowd is not True and integer(iscrowd) not in (0, 1):
        raise ConfigError(f"iscrowd {short(iscrowd)} is neither 0 nor 1")
    box = _box(raw.get("bbox"), _extent(rle), height, width, note, formats)
    area: Any = raw.get("area")
    if not (is_number(area) and area > 0):
        area = box_area(box) if rle is None else rle_ops.area(rle)
        note(Reason.AREA)
    crowd = iscrowd is True or integer(iscrowd) == 1
    return ObjectRecord(raw["id"], label, box, rle, crowd, float(area))


# -- boxes -----------------------------------------------------------------------------------------


def _box(
    bbox: Any, extent: Box | None, height: int, width: int, note: Note, formats: BoxFormats
) -> Box:
    """The box inside the image that is meant; `extent` is that of the mask, if there is one."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        if extent is not None:
            note(Reason.BOX_FROM_MASK)
            return extent
        if has_constant(bbox):
            raise ConfigError("bbox holds NaN or Infinity, and there is no mask to take it from")
        raise Dropped(Reason.NO_BOX)
    x, y, w, h = (float(value) for value in bbox)
    formats.add((x, y, w, h), extent, height, width)
    if min(w, h) < MIN_SIDE:
        raise Dropped(Reason.DEGENERATE)
    box = clipped((x, y, x + w, y + h), height, width)
    if extent is not None and _far(box, extent):
        note(Reason.FAR_FROM_MASK)
        return extent
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
        raise Dropped(Reason.OUTSIDE)
    if box != (x, y, x + w, y + h):
        note(Reason.CLIPPED)
    return box


def clipped(box: Box, height: int, width: int) -> Box:
    """The part of a box that lies inside the image."""
    x1, y1, x2, y2 = (
        min(max(side, 0.0), limit) for side, limit in zip(box, (width, height) * 2, strict=True)
    )
    return x1, y1, x2, y2


def _extent(rle: RLE | None) -> Box | None:
    """The box around a mask's pixels; None if there are none."""
    if rle is None:
        return None
    x, y, w, h = rle_ops.toBbox(rle).tolist()
    return (x, y, x + w, y + h) if w and h else None


def _far(box: Box, extent: Box) -> bool:
    """Whether a box is not that of its mask (see FAR_IOU)."""
    if max(abs(a - b) for a, b in zip(box, extent, strict=True)) <= FAR_SIDE:
        return False
    overlap = max(0.0, min(box[2], extent[2]) - max(box[0], extent[0])) * max(
        0.0, min(box[3], extent[3]) - max(box[1], extent[1])
    )
    return overlap < FAR_IOU * (box_area(box) + box_area(extent) - overlap)


@dataclass
class BoxFormats:
    """Evidence, over a whole file, that its boxes are corners or fractions of the image instead of
    (x, y, width, height) in pixels."""

    boxes: int = 0
    not_sizes: int = 0  # impossible as (x, y, w, h)
    not_corners: int = 0  # impossible as (x1, y1, x2, y2)
    fractions: int = 0

    def add(self, bbox: Box, extent: Box | None, height: int, width: int) -> None:
        """Counts one box as written; `extent` is that of its mask, if there is one."""
        x, y, w, h = bbox

        def impossible(box: Box) -> bool:
            inside = clipped(box, height, width)
            outside = max(abs(a - b) for a, b in zip(box, inside, strict=True))
            if outside > 1 or box[2] <= box[0] or box[3] <= box[1]:
                return True
            return extent is not None and _far(inside, extent)

        self.boxes += 1
        self.not_sizes += impossible((x, y, x + w, y + h))
        self.not_corners += impossible(bbox)
        # In a tiny image, or where the mask agrees, a box of one pixel in the corner is just that.
        self.fractions += (
            min(bbox) >= 0
            and max(bbox) <= 1
            and min(height, width) >= 8
            and (extent is None or _far((x, y, x + w, y + h), extent))
        )

    def refuse(self, path: Path) -> None:
        """ConfigError, with a hint, if the share of impossible boxes is telling."""
        if self.fractions and self.fractions >= 0.5 * self.boxes:
            raise ConfigError(
                f"{path}: {self.fractions} of {self.boxes} boxes lie in 0..1, which is no box in "
                "pixels; they fit as fractions of the image: multiply them by its width and height"
            )
        # A correct (x, y, w, h) is often impossible as corners; one or two boxes that leave the
        # image by far prove nothing.
        if self.not_sizes >= max(2, 0.2 * self.boxes) and self.not_corners <= 0.05 * self.boxes:
            raise ConfigError(
                f"{path}: {self.not_sizes} of {self.boxes} boxes are impossible as [x, y, width, "
                "height]; they fit as [x1, y1, x2, y2]: write [x1, y1, x2 - x1, y2 - y1]"
            )


# -- masks -----------------------------------------------------------------------------------------


def mask_rle(segmentation: Any, height: int, width: int, note: Note) -> RLE | None:
    """A segmentation (polygons, a list of runs or COCO's compressed runs) as compressed runs; None
    if there is none, Dropped if it is unusable."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        if all(part == [] for part in segmentation):
            return None
        rle = _polygons_rle(segmentation, height, width, note)
    elif isinstance(segmentation, dict) and segmentation.get("size") == [height, width]:
        runs = _run_lengths(segmentation.get("counts"), note)
        if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != height * width:
            raise Dropped(Reason.UNUSABLE_MASK)
        rle = rle_ops.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        if 0 in runs[1:]:  # pycocotools computes meaningless boxes from these
            rle = rle_ops.encode(rle_ops.decode(rle))
    else:
        raise Dropped(Reason.UNUSABLE_MASK)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _polygons_rle(parts: list[Any], height: int, width: int, note: Note) -> RLE:
    if all(map(is_number, parts)):
        note(Reason.FLAT_POLYGON)
        parts = [parts]
    polygons = [part for part in parts if is_polygon(part, height, width)]
    if not polygons:
        raise Dropped(Reason.UNUSABLE_MASK)
    if len(polygons) < len(parts):
        note(Reason.POLYGON)
    rles = rle_ops.frPyObjects(polygons, height, width)
    while len(rles) > 64:  # each merge reads everything merged before it once more
        rles = [rle_ops.merge(rles[i : i + 64]) for i in range(0, len(rles), 64)]
    return rle_ops.merge(rles)


def is_polygon(part: Any, height: int, width: int) -> bool:
    """Whether a value is a list x1, y1, x2, y2, ... of at least three points, none further from
    the image than its longer side."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    if not set(map(type, part)) <= {int, float}:
        return False
    side = max(height, width)
    if not (min(part) >= -side and max(part) <= 2 * side):
        return False
    points = np.array(part, np.float64).reshape(-1, 2)
    return bool(np.abs(np.diff(points, axis=0)).max(1).sum() <= OUTLINE)


def _run_lengths(counts: Any, note: Note) -> list[Any]:
    """The runs in a list, in COCO's compressed text, or in that text as bytes or as Python prints
    bytes."""
    if isinstance(counts, list):
        note(Reason.RUN_LIST)
        return counts
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        try:
            counts = ast.literal_eval(counts)
        except (ValueError, SyntaxError, MemoryError):
            raise Dropped(Reason.UNUSABLE_MASK) from None
    if isinstance(counts, bytes):
        note(Reason.RUN_BYTES)
        counts = counts.decode("ascii", "replace")
    runs = decompressed(counts) if isinstance(counts, str) else None
    if runs is None:
        raise Dropped(Reason.UNUSABLE_MASK)
    return runs
