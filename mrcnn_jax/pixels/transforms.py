"""Geometry on the host: an image's place and pixels on its canvas, masks cropped to boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from mrcnn_jax.config.schema import DataConfig, Shrink
from mrcnn_jax.pixels.geometry import Plan, resize_plan


def plan_for(height: int, width: int, data: DataConfig) -> Plan:
    """The plan for an image of height x width with the sides and canvases of `data`."""
    return resize_plan(height, width, data.short_side, data.long_side, data.canvases)


def resize_image(
    image: UInt8[np.ndarray, "h w *c"], size: tuple[int, int], shrink: Shrink
) -> UInt8[np.ndarray, "rh rw *c"]:
    """Resizes to `size` (height, width): by `shrink` to a smaller one, bilinearly to a larger."""
    area = shrink == "area" and size[0] < image.shape[0]
    method = cv2.INTER_AREA if area else cv2.INTER_LINEAR
    return cv2.resize(image, (size[1], size[0]), interpolation=method)  # type: ignore[return-value]


@dataclass(frozen=True)
class Transform:
    """What is done to an image: resized, mirrored if `flip`, then the window of `size` at `offset`.

    All are (height, width) or (y, x) in whole pixels. The window may reach beyond the image, for
    example where `offset` is negative; nothing is visible there.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    size: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    flip: bool = False
    shrink: Shrink = "area"

    @property
    def scale(self) -> tuple[float, float]:
        """(y, x): resized / original."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    @property
    def window(self) -> tuple[float, float, float, float]:
        """The visible part of the image, (x1, y1, x2, y2) in its own pixels."""
        bounds = []
        for axis in (1, 0):
            start, end = self.offset[axis], self.resized[axis]
            stop = start + self.size[axis]
            if axis == 1 and self.flip:
                start, stop = end - stop, end - start
            # Exactly the image's own border, so that an object there counts as whole.
            low = 0.0 if start <= 0 else start / self.scale[axis]
            high = float(self.original[axis]) if stop >= end else stop / self.scale[axis]
            bounds.append((low, high))
        (x1, x2), (y1, y2) = bounds
        return x1, y1, x2, y2

    def pixels(self, image: UInt8[np.ndarray, "h w *c"]) -> UInt8[np.ndarray, "vh vw *c"]:
        """`size` pixels, zero where nothing is visible. Masks of 0 and 255 count as images."""
        resized = resize_image(image, self.resized, self.shrink)[:, :: -1 if self.flip else 1]
        (y, x), (height, width) = self.offset, self.size
        seen = resized[max(y, 0) : y + height, max(x, 0) : x + width]
        if seen.shape[:2] == self.size:
            return seen
        before = max(-y, 0), max(-x, 0)
        sides = zip(before, self.size, seen.shape, strict=False)
        around = [(low, side - low - part) for low, side, part in sides]
        return np.pad(seen, around + [(0, 0)] * (image.ndim - 2))

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Boxes of the image in window pixels, clipped to `size`, float32.

        A box that is not visible has no positive side.
        """
        (y, x), (top, left), (height, width) = self.scale, self.offset, self.size
        if self.flip:
            mirror, signs = self.original[1], np.array([-1, 1, -1, 1], np.float32)
            boxes = np.array([mirror, 0, mirror, 0], np.float32) + signs * boxes[:, [2, 1, 0, 3]]
        placed = boxes * np.array([x, y, x, y], np.float32) - np.array(
            [left, top, left, top], np.float32
        )
        return np.clip(placed, 0, np.array([width, height, width, height], np.float32))

    def from_canvas(self, seen: Bool[np.ndarray, "vh vw"]) -> Bool[np.ndarray, "h w"]:
        """`seen`, a mask of the window, at the centres of the image's own pixels; False outside."""
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
    """Resamples the columns of `values` to `cells` equal cells of [start, stop].

    Value i fills [i, i + 1]. A cell is the mean over the window around its centre that is as wide
    as the cell, but at least 1: the area mean if the column shrinks, exactly bilinear interpolation
    if it grows. The first and last values extend beyond the ends. Cumulative sums replace a matrix
    product, whose BLAS threads would compete with the loader's.
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


def coverage(
    mask: UInt8[np.ndarray, "h w"], box: Sequence[float], size: int
) -> UInt8[np.ndarray, "size size"]:
    """Coverage of a box's cells by a mask.

    Args:
        mask: 0 and 1, in original pixels.
        box: (x1, y1, x2, y2) in the same pixels; fractions are allowed.
        size: the box is divided into size x size cells.

    Returns:
        0 (no part of the cell is covered) to 255 (all of it).
    """
    # One more pixel on each side, for windows that reach over the border of the box.
    left, top = (max(math.floor(low) - 1, 0) for low in box[:2])
    right, bottom = (math.ceil(high) + 1 for high in box[2:])
    near = mask[top:bottom, left:right].astype(np.float32)
    rows = _window_means(near, box[1] - top, box[3] - top, size)
    cells = _window_means(rows.T, box[0] - left, box[2] - left, size).T
    return np.round(255 * cells).clip(0, 255).astype(np.uint8)
