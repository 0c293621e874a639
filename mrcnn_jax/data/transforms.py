"""Host side of the geometry: where an image lies on its canvas, its pixels there, and its masks as
crops of their boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.pixels import geometry


@dataclass(frozen=True)
class Plan:
    """How an image becomes a canvas: resized to `resized` (height, width) and put at the top left
    of canvas number `canvas`.

    `scale` (y, x) is resized / original exactly, not the nominal factor: what boxes are multiplied
    with.
    """

    canvas: int
    resized: tuple[int, int]
    scale: tuple[float, float]


def resize_plan(height: int, width: int, data: DataConfig) -> Plan:
    """Scale min(short_side / short, long_side / long), sides rounded down (as in the report: 300 x
    400 becomes 800 x 1066).

    The canvas is the smallest that holds the image, the first of equals.
    """
    return Plan(
        *geometry.resize_plan(height, width, data.short_side, data.long_side, data.canvases)
    )


def resize_image(
    image: UInt8[np.ndarray, "h w *c"], size: tuple[int, int]
) -> UInt8[np.ndarray, "rh rw *c"]:
    """To `size` (height, width): bilinear when it grows, area mean when it shrinks (no
    aliasing)."""
    shrinks = size[0] < image.shape[0]
    return cv2.resize(
        image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )  # type: ignore[return-value]


@dataclass(frozen=True)
class View:
    """What is seen of an image: resized, mirrored if `flip`, and of that the window of `size` that
    begins at `offset`.

    All are (height, width) or (y, x) in whole pixels. Beyond the image, as where `offset` is
    negative, nothing is seen.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    size: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """(y, x): resized / original."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    @property
    def window(self) -> tuple[float, float, float, float]:
        """The part of the image that is seen, (x1, y1, x2, y2) in its own pixels."""
        bounds = []
        for axis in (1, 0):
            start, stop, end = (
                self.offset[axis],
                self.offset[axis] + self.size[axis],
                self.resized[axis],
            )
            if axis == 1 and self.flip:
                start, stop = end - stop, end - start
            # The image's own border exactly, so that an object there counts as whole.
            low = 0.0 if start <= 0 else start / self.scale[axis]
            bounds.append(
                (low, float(self.original[axis]) if stop >= end else stop / self.scale[axis])
            )
        (x1, x2), (y1, y2) = bounds
        return x1, y1, x2, y2

    def pixels(self, image: UInt8[np.ndarray, "h w *c"]) -> UInt8[np.ndarray, "vh vw *c"]:
        """`size` pixels, zero where nothing is seen. A mask of 0 and 255 is an image too."""
        resized = resize_image(image, self.resized)[:, :: -1 if self.flip else 1]
        (y, x), (height, width) = self.offset, self.size
        seen = resized[max(y, 0) : y + height, max(x, 0) : x + width]
        if seen.shape[:2] == self.size:
            return seen
        before = max(-y, 0), max(-x, 0)
        around = [
            (low, side - low - part)
            for low, side, part in zip(before, self.size, seen.shape, strict=False)
        ]
        return np.pad(seen, around + [(0, 0)] * (image.ndim - 2))

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Boxes of the image where they are seen, cut to `size`; float32. Of one that is not seen
        no side is positive."""
        (y, x), (top, left), (height, width) = self.scale, self.offset, self.size
        if self.flip:
            mirror = self.original[1]
            boxes = (
                np.array([mirror, 0, mirror, 0], np.float32)
                + np.array([-1, 1, -1, 1], np.float32) * boxes[:, [2, 1, 0, 3]]
            )
        placed = boxes * np.array([x, y, x, y], np.float32) - np.array(
            [left, top, left, top], np.float32
        )
        return np.clip(placed, 0, np.array([width, height, width, height], np.float32))

    def from_canvas(self, seen: Bool[np.ndarray, "vh vw"]) -> Bool[np.ndarray, "h w"]:
        """What `seen` says at the centre of each of the image's own pixels; False where that is not
        seen."""
        places, inside = [], []
        for axis in (0, 1):
            centres = (np.arange(self.original[axis]) + 0.5) * self.scale[axis]
            if axis == 1 and self.flip:
                centres = self.resized[axis] - centres
            place = np.floor(centres - self.offset[axis]).astype(np.intp)
            inside.append(np.flatnonzero((place >= 0) & (place < self.size[axis])))
            places.append(place[inside[-1]])
        found = np.zeros(self.original, bool)
        found[np.ix_(*inside)] = seen[np.ix_(*places)]
        return found


def _window_means(
    values: Float[np.ndarray, "n k"], start: float, stop: float, cells: int
) -> Float[np.ndarray, "cells k"]:
    """Resamples the columns of `values` to `cells` equal cells of [start, stop], where value i
    fills [i, i + 1].

    A cell averages the window around its centre that is as wide as the cell but at least 1: the
    area mean when the column shrinks, and when it grows exactly bilinear interpolation (the mean of
    a piecewise constant function over a width of 1). The first and last values extend beyond the
    ends. Sums instead of a matrix product: BLAS threads fight with the loader's.
    """
    step = (stop - start) / cells
    half = max(step, 1.0) / 2
    centres = start + step * (np.arange(cells) + 0.5)
    integral = np.zeros_like(values)
    np.cumsum(values[:-1], axis=0, out=integral[1:])

    def integral_to(position: Float[np.ndarray, " cells"]) -> Float[np.ndarray, "cells k"]:
        whole = np.clip(np.floor(position), 0, len(values) - 1).astype(np.intp)
        return integral[whole] + (position - whole).astype(np.float32)[:, None] * values[whole]

    return (integral_to(centres + half) - integral_to(centres - half)) / np.float32(2 * half)


def mask_crop(
    rle: dict[str, Any], box: Sequence[float], size: int
) -> UInt8[np.ndarray, "size size"]:
    """Coverage 0..255 of a mask inside its box (x1, y1, x2, y2; original pixels, fractions
    allowed), on size x size cells."""
    return coverage(rle_ops.decode(rle), box, size)


def coverage(
    mask: UInt8[np.ndarray, "h w"], box: Sequence[float], size: int
) -> UInt8[np.ndarray, "size size"]:
    """`mask_crop` of a mask that is decoded: 0 and 1."""
    # One pixel more on each side, for windows that reach over the border of the box.
    left, top = (max(math.floor(low) - 1, 0) for low in box[:2])
    right, bottom = (math.ceil(high) + 1 for high in box[2:])
    near = mask[top:bottom, left:right].astype(np.float32)
    rows = _window_means(near, box[1] - top, box[3] - top, size)
    cells = _window_means(rows.T, box[0] - left, box[2] - left, size).T
    return np.round(255 * cells).clip(0, 255).astype(np.uint8)
