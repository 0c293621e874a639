"""The mistakes that put boxes and masks of one file into different places, known by what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.pixels.places import (
    FIT_IOU,
    RLE,
    Box,
    corners_of,
    far,
    mask_extent,
    outside,
    swapped,
)

MOST = 0.8  # of the annotations that are odd: a reading that fits so many explains them


@dataclass(frozen=True)
class Suspect:
    """An annotation whose mask is not where its bbox is."""

    bbox: Box
    """As written: x, y, width, height are meant."""
    extent: Box
    """The box around the mask as written."""
    rle: RLE | None
    """Of a mask that was written as run lengths."""
    height: int
    width: int


def usual_mistake(known: Sequence[Suspect]) -> str | None:
    """What most of these annotations look like and how to repair it; None if nothing explains them.

    Args:
        known: at least one.
    """
    for reading, explains in _readings(known):
        if sum(map(explains, known)) >= MOST * len(known):
            return reading
    return None


def near(box: Box, extent: Box) -> bool:
    """Whether a box is in the place of a mask, more closely than by chance."""
    return not far(box, extent, FIT_IOU)


def _readings(known: Sequence[Suspect]) -> list[tuple[str, Callable[[Suspect], bool]]]:
    """(What masks or boxes look like and how to repair it, whether that explains one of them)."""
    swap = "the polygons fit as (y, x): write x, y, x, y, ..."
    # Either may be the one with y first. The wrong one leaves images that are not square.
    boxes_leave = sum(outside(corners_of(s.bbox), s.height, s.width) > 1 for s in known)
    masks_leave = sum(outside(s.extent, s.height, s.width) > 1 for s in known)
    if boxes_leave > masks_leave:
        swap = "the boxes fit as [y, x, height, width]: write [x, y, width, height]"
    if all(s.rle is not None for s in known):
        swap = "the masks fit when rows and columns are exchanged: encode [height, width] arrays"
    return [
        (swap, lambda s: near(corners_of(s.bbox), swapped(s.extent))),
        (
            "the boxes fit as [x1, y1, x2, y2]: write [x1, y1, x2 - x1, y2 - y1]",
            lambda s: near(s.bbox, s.extent),
        ),
        (
            "the boxes fit as [y1, x1, y2, x2]: write [x1, y1, x2 - x1, y2 - y1]",
            lambda s: near(swapped(s.bbox), s.extent),
        ),
        (
            "the boxes fit as [centre x, centre y, width, height]: write the upper left corner",
            lambda s: near(_moved(corners_of(s.bbox), -s.bbox[2] / 2, -s.bbox[3] / 2), s.extent),
        ),
        (
            "the masks fit as counted from the corner of their box: add its x and y to them",
            lambda s: near(corners_of(s.bbox), _moved(s.extent, *s.bbox[:2])),
        ),
        (
            "the masks fit upside down: y counts from the top, write height - y",
            lambda s: near(
                corners_of(s.bbox),
                (s.extent[0], s.height - s.extent[3], s.extent[2], s.height - s.extent[1]),
            ),
        ),
        (
            "the run lengths fit as rows: they run down the columns in COCO "
            "(pycocotools.mask.encode(np.asfortranarray(mask)))",
            _fits_as_rows,
        ),
        *_other_pictures(known),
    ]


def _moved(box: Box, x: float, y: float) -> Box:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _fits_as_rows(suspect: Suspect) -> bool:
    if suspect.rle is None:
        return False
    runs = rle_ops.decode(suspect.rle).ravel(order="F")
    mask = np.asfortranarray(runs.reshape(suspect.height, suspect.width))
    extent = mask_extent(rle_ops.encode(mask))
    return extent is not None and near(corners_of(suspect.bbox), extent)


def _other_pictures(known: Sequence[Suspect]) -> list[tuple[str, Callable[[Suspect], bool]]]:
    """Masks drawn on a picture of another size: by a factor, or of one size for all images."""
    if len(known) < 3:  # a factor fits one or two of anything
        return []
    ratios = np.array(
        [[(s.extent[i + 2] - s.extent[i]) / s.bbox[i + 2] for i in (0, 1)] for s in known]
    )
    factor = np.median(ratios, axis=0)
    frame = np.median(ratios * [[s.width, s.height] for s in known], axis=0)
    if min(*factor, *frame) <= 0:
        return []

    def scaled(suspect: Suspect, x: float, y: float) -> bool:
        x1, y1, x2, y2 = suspect.extent
        return near(corners_of(suspect.bbox), (x1 * x, y1 * y, x2 * x, y2 * y))

    of = "the masks fit as drawn on a picture of"
    sides = "{:.0f} x {:.0f}".format(*frame)
    return [
        (
            f"{of} {factor[0]:.3g} times the width and {factor[1]:.3g} times the height of the one "
            "that the boxes are on: scale them",
            lambda s: scaled(s, *(1 / factor)),
        ),
        (
            f"{of} {sides} (width x height): scale x by width / {frame[0]:.0f} and y by height / "
            f"{frame[1]:.0f}",
            lambda s: scaled(s, s.width / frame[0], s.height / frame[1]),
        ),
    ]
