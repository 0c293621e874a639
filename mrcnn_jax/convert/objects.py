"""The shapes of an image as the objects of a COCO file.

Polygons stay polygons, masks become compressed run lengths; an object of both becomes run lengths.
A box is the extent of what was drawn, or the box that was drawn, clipped to the image.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import AnnotatedImage, Options, Patch, Shape, normal_label
from mrcnn_jax.data.json_values import is_text
from mrcnn_jax.data.repair import MIN_SIDE, is_polygon
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.geometry import mask_box
from mrcnn_jax.pixels.places import RLE, Box, box_area, clipped, mask_extent


@dataclass(frozen=True)
class Object:
    """An annotation without its ids."""

    label: str
    segmentation: list[list[float]] | RLE | None
    box: Box
    area: float
    iscrowd: bool


def objects_of(
    annotated: AnnotatedImage,
    size: tuple[int, int],
    options: Options,
    names: tuple[str, ...] | None,
    report: Report,
) -> tuple[Object, ...]:
    """The shapes of an image as objects; those of one label and group are one."""
    groups: dict[Hashable, list[Shape]] = defaultdict(list)
    skipped = set(map(normal_label, options.skip))
    for number, shape in enumerate(annotated.shapes):
        label, name = normal_label(shape.label), f"{annotated.name}: {shape.where}"
        where = f"{annotated.where}: {shape.where}"
        if label in skipped:
            report.add(Reason.SKIPPED, name, label=label)
            continue
        if not is_text(label):
            raise ConfigError(f"{where}: its label {shape.label!r} is not printable")
        if names is not None and label not in names:
            near = difflib.get_close_matches(label, names, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(
                f"{where}: its label {label!r} is not in {options.categories}{hint}; "
                "--skip leaves it out"
            )
        if label != shape.label:
            report.add(Reason.LABEL, name)
        groups[label, number if shape.group is None else (shape.group,)].append(shape)
    objects = (
        _object(shapes, size, f"{annotated.name}: {shapes[0].where}", report)
        for shapes in groups.values()
    )
    return tuple(item for item in objects if item is not None)


def _object(shapes: list[Shape], size: tuple[int, int], name: str, report: Report) -> Object | None:
    """The shapes as one annotation; None, reported, if nothing of it is left."""
    height, width = size
    drawn = [shape for shape in shapes if shape.polygon is not None or shape.patch is not None]
    usable = [s for s in drawn if s.polygon is None or is_polygon(s.polygon, height, width)]
    extents = [_extent(shape) for shape in shapes if shape in usable or shape not in drawn]
    boxes = [extent for extent in extents if extent is not None]
    if len(usable) < len(drawn):
        report.add(Reason.POLYGON if boxes else Reason.UNUSABLE_MASK, name)
    if not boxes:
        if len(usable) == len(drawn):
            report.add(Reason.NO_PIXEL, name)
        return None
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    whole = min(x1), min(y1), max(x2), max(y2)
    box = clipped(whole, height, width)
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
        degenerate = min(whole[2] - whole[0], whole[3] - whole[1]) < MIN_SIDE
        report.add(Reason.DEGENERATE if degenerate else Reason.OUTSIDE, name)
        return None
    rle = _rle(usable, height, width)
    if rle is not None and rle_ops.area(rle) == 0:
        report.add(Reason.NO_PIXEL, name)
        return None
    if box != whole:
        report.add(Reason.CLIPPED, name)
        if rle is not None and all(shape.box is None for shape in shapes):
            # The extent of the part inside may be smaller than the clipped box.
            box = mask_extent(rle) or box
    iscrowd = any(shape.iscrowd for shape in shapes)
    area = box_area(box) if rle is None else float(rle_ops.area(rle))
    segmentation: list[list[float]] | RLE | None = rle
    if usable and all(shape.patch is None for shape in usable):
        segmentation = [shape.polygon for shape in usable if shape.polygon is not None]
    return Object(normal_label(shapes[0].label), segmentation, box, area, iscrowd)


def _extent(shape: Shape) -> Box | None:
    """The box of a shape; None if its mask has no pixel."""
    if shape.box is not None:
        return shape.box
    if shape.polygon is not None:
        return (
            min(shape.polygon[::2]),
            min(shape.polygon[1::2]),
            max(shape.polygon[::2]),
            max(shape.polygon[1::2]),
        )
    patch = shape.patch or Patch(np.zeros((0, 0), bool))
    x1, y1, x2, y2 = mask_box(patch.pixels)
    if x1 == x2:
        return None
    return patch.left + x1, patch.top + y1, patch.left + x2, patch.top + y2


def _rle(shapes: list[Shape], height: int, width: int) -> RLE | None:
    """The union of polygons and patches; None if there are none."""
    patches = [shape.patch for shape in shapes if shape.patch is not None]
    polygons = [shape.polygon for shape in shapes if shape.polygon is not None]
    rles = [rle_ops.encode(_whole(patch, height, width)) for patch in patches]
    if polygons:
        rles += rle_ops.frPyObjects(polygons, height, width)
    if not rles:
        return None
    return {"size": [height, width], "counts": rle_ops.merge(rles)["counts"].decode("ascii")}


def _whole(patch: Patch, height: int, width: int) -> np.ndarray:
    """A patch as a uint8 mask [height, width] of the image, in the order that pycocotools needs."""
    whole = np.zeros((height, width), np.uint8, order="F")
    rows, columns = patch.pixels.shape
    top, left = max(patch.top, 0), max(patch.left, 0)
    bottom, right = min(patch.top + rows, height), min(patch.left + columns, width)
    if top < bottom and left < right:
        whole[top:bottom, left:right] = patch.pixels[
            top - patch.top : bottom - patch.top, left - patch.left : right - patch.left
        ]
    return whole
