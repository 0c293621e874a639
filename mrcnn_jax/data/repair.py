"""One raw annotation -> `ObjectRecord`: its box and mask are checked and, if possible, repaired.

pycocotools trusts its input: a wrong length reads or writes beyond its buffers, and a far point
takes any amount of memory. Everything is therefore checked before it gets there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.formats import Formats, flat_polygons
from mrcnn_jax.data.json_values import has_constant, integer, is_number, short
from mrcnn_jax.data.records import ObjectRecord
from mrcnn_jax.data.report import Reason
from mrcnn_jax.pixels.places import FIT_IOU, RLE, Box, box_area, clipped, far, mask_extent
from mrcnn_jax.pixels.rle import decompressed

Note = Callable[[Reason], object]  # counts a reason for the annotation at hand

MIN_SIDE = 0.1  # px: a box with a shorter side is degenerate
# An annotated area is wrong from these factors on: over that of the box, over or under the mask's.
AREA_OF_BOX, AREA_OF_MASK = 1.05, 2.0
# px: no real polygon has a longer outline, and pycocotools would need 80 bytes for each pixel of it
OUTLINE = 3.2e6


class Dropped(Exception):
    """An image or annotation is unusable, for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


def object_record(
    raw: dict[str, Any], label: int, height: int, width: int, note: Note, formats: Formats
) -> ObjectRecord:
    """The checked record of an annotation in an image of height x width.

    Reasons for repairs go to `note`, box and mask as written to `formats`. Raises Dropped if the
    annotation is unusable, ConfigError, without the file's name, if the whole file is.
    """
    bbox, segmentation = _written_box(raw.get("bbox")), raw.get("segmentation")
    try:
        rle = mask_rle(segmentation, height, width, note)
    except Dropped:
        formats.add(bbox, segmentation, None, None, height, width)
        raise
    extent = mask_extent(rle)
    formats.add(bbox, None if rle is None else segmentation, rle, extent, height, width)
    iscrowd = raw.get("iscrowd") or 0
    if iscrowd is not True and integer(iscrowd) not in (0, 1):
        raise ConfigError(f"iscrowd {short(iscrowd)} is neither 0 nor 1")
    if rle is not None and extent is None:
        if bbox is None:
            raise Dropped(Reason.NO_PIXEL)
        note(Reason.EMPTY_MASK)
        rle = None
    if bbox is None or min(bbox[2:]) < MIN_SIDE:
        box = _box_of_mask(raw.get("bbox"), extent)
        note(Reason.BOX_FROM_MASK)
    else:
        box = _box(bbox, extent, height, width, note)
    area = _area(raw.get("area"), box, rle, note)
    crowd = iscrowd is True or integer(iscrowd) == 1
    return ObjectRecord(raw["id"], label, box, rle, crowd, area)


# -- boxes -----------------------------------------------------------------------------------------


def _written_box(bbox: Any) -> Box | None:
    """A bbox of four numbers with sides over 0, as it is written; None for any other."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        return None
    x, y, w, h = (float(value) for value in bbox)
    return (x, y, w, h) if min(w, h) > 0 else None


def _box_of_mask(bbox: Any, extent: Box | None) -> Box:
    """The box around a mask that stands for an unusable `bbox`, if there is one."""
    if extent is not None:
        return extent
    if has_constant(bbox):
        raise ConfigError("bbox holds NaN or Infinity, and there is no mask to take it from")
    four = isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox))
    raise Dropped(Reason.DEGENERATE if four else Reason.NO_BOX)


def _box(bbox: Box, extent: Box | None, height: int, width: int, note: Note) -> Box:
    """The box inside the image that is meant; `extent` is that of the mask, if it has pixels."""
    x, y, w, h = bbox
    box = clipped((x, y, x + w, y + h), height, width)
    if extent is not None and far(box, extent):
        note(Reason.FAR_FROM_MASK)
        return extent
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
        if extent is None:
            raise Dropped(Reason.OUTSIDE)
        note(Reason.BOX_FROM_MASK)
        return extent
    if extent is not None and far(box, extent, FIT_IOU):
        note(Reason.LOOSE_BOX)
    if box != (x, y, x + w, y + h):
        note(Reason.CLIPPED)
    return box


def _area(area: Any, box: Box, rle: RLE | None, note: Note) -> float:
    """The annotated area, or that of the mask (else of the box) where it is none or cannot be."""
    own = box_area(box) if rle is None else float(rle_ops.area(rle))
    if not (is_number(area) and area > 0):
        note(Reason.AREA)
        return own
    largest = AREA_OF_BOX * max(own, box_area(box))
    off = rle is not None and not own / AREA_OF_MASK <= area <= own * AREA_OF_MASK
    if area > largest or off:
        note(Reason.WRONG_AREA)
        return own
    return float(area)


# -- masks -----------------------------------------------------------------------------------------


def mask_rle(segmentation: Any, height: int, width: int, note: Note) -> RLE | None:
    """A segmentation as compressed runs; None if there is none, Dropped if it is unusable."""
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
    parts, points = flat_polygons(parts)
    if points:
        note(Reason.PAIRS)
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
    """Whether a value is a list x, y, x, y, ... of 3 points or more, none far from the image."""
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
    """The runs in a list, or in COCO's text, also as bytes or as Python prints bytes."""
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
