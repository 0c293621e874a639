"""The masks of several runs for the same objects, side by side (figures 2 and 3 of the report)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from pycocotools import mask as coco_mask

from mrcnn_jax.figures.draw import Color, Image, darkened, resized, tint
from mrcnn_jax.figures.png_pages import drawn_size, row_of_columns, write_pages
from mrcnn_jax.pixels.rle import segmentation_rle

AGREED: Color = (60, 220, 130)
EXCESS: Color = (255, 50, 50)
LACKING: Color = (255, 214, 10)


def masks_figure(
    images: Sequence[Image],
    objects: Sequence[Mapping[str, Any]],
    masks: Mapping[str, Sequence[Mapping[str, Any]]],
    class_names: Mapping[int, str],
    out_dir: Path,
) -> list[Path]:
    """Draw a row for each object, zoomed in on it: its ground-truth mask, then each run's.

    Colours show where a run's mask is right, too large and too small.

    Args:
        images: uint8 RGB [H, W, 3] in original pixels.
        objects: for each image a COCO annotation with a mask.
        masks: title of a column -> a COCO segmentation of each object.
        class_names: category id -> name.
        out_dir: folder of the pages, created if need be.

    Returns:
        The pages, `masks_1.png`, `masks_2.png`, ...
    """
    columns = 1 + len(masks)
    drawn = []
    for i, (image, annotation) in enumerate(zip(images, objects, strict=True)):
        truth = segmentation_rle(annotation["segmentation"], image.shape[:2])
        shown = {f"ground truth: {class_names[annotation['category_id']]}": truth}
        for title, column in masks.items():
            rle = segmentation_rle(column[i], image.shape[:2])
            shown[f"{title}: mask IoU {coco_mask.iou([rle], [truth], [0])[0, 0]:.2f}"] = rle
        region = zoomed_region(annotation["bbox"], image.shape[:2])
        part = image[region]
        size = drawn_size(part, columns)
        cells = [
            _compared(part, size, *(_decoded(rle, region, size) for rle in (truth, mask)))
            for mask in shown.values()
        ]
        drawn.append(row_of_columns(cells, list(shown), columns))
    colors = {
        "mask on the object": AGREED,
        "mask beyond the object": EXCESS,
        "object that the mask leaves out": LACKING,
    }
    return write_pages(drawn, out_dir, "masks", rows=3, colors=colors)


def zoomed_region(bbox: Sequence[float], size: tuple[int, int]) -> tuple[slice, slice]:
    """Slice (rows, columns) around a COCO bbox out of an image of `size` (height, width).

    The margin is a fifth of the longer side of the bbox, and at least 8 pixels.
    """
    x, y, width, height = bbox
    around = max(0.2 * max(width, height), 8)
    top, left = max(int(y - around), 0), max(int(x - around), 0)
    bottom = min(int(np.ceil(y + height + around)), size[0])
    right = min(int(np.ceil(x + width + around)), size[1])
    return slice(top, bottom), slice(left, right)


def _decoded(
    rle: Mapping[str, Any], region: tuple[slice, slice], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w"]:
    """The part of a mask in a region, 0 or 1, its pixels enlarged as they are."""
    part = np.ascontiguousarray(coco_mask.decode(rle)[region])
    return cv2.resize(part, size[::-1], interpolation=cv2.INTER_NEAREST)


def _compared(
    part: Image,
    size: tuple[int, int],
    truth: UInt8[np.ndarray, "h w"],
    mask: UInt8[np.ndarray, "h w"],
) -> Image:
    # On grey, so that every colour is a mask's.
    grey = cv2.cvtColor(resized(part, size), cv2.COLOR_RGB2GRAY)
    canvas = darkened(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB))
    for pixels, color in (
        (truth & mask, AGREED),
        (mask & (1 - truth), EXCESS),
        (truth & (1 - mask), LACKING),
    ):
        tint(canvas, pixels, color)
    return canvas
