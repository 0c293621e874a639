"""Host side of the geometry: where an image lies on its canvas, its pixels there, and its masks as crops of their boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from pycocotools import mask as rle_ops

from mrcnn_jax import exported
from mrcnn_jax.config import DataConfig


@dataclass(frozen=True)
class Plan:
    """How an image becomes a canvas: resized to `resized` (height, width) and put at the top left of canvas number `canvas`.

    `scale` (y, x) is resized / original exactly, not the nominal factor: what boxes are multiplied with.
    """

    canvas: int
    resized: tuple[int, int]
    scale: tuple[float, float]


def resize_plan(height: int, width: int, data: DataConfig) -> Plan:
    """Scale min(short_side / short, long_side / long), sides rounded down (SPEC section 1: 300 x 400 becomes 800 x 1066).

    The canvas is the smallest that holds the image, the first of equals.
    """
    return Plan(*exported.resize_plan(height, width, data.short_side, data.long_side, data.canvases))


def resize_image(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "rh rw 3"]:
    """To `size` (height, width): bilinear when it grows, area mean when it shrinks (no aliasing)."""
    shrinks = size[0] < image.shape[0]
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)  # type: ignore[return-value]


def _window_means(values: Float[np.ndarray, "n k"], start: float, stop: float, cells: int) -> Float[np.ndarray, "cells k"]:
    """Resamples the columns of `values` to `cells` equal cells of [start, stop], where value i fills [i, i + 1].

    A cell averages the window around its centre that is as wide as the cell but at least 1: the area mean when the column
    shrinks, and when it grows exactly bilinear interpolation (the mean of a piecewise constant function over a width of 1).
    The first and last values extend beyond the ends. Sums instead of a matrix product: BLAS threads fight with the loader's.
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


def mask_crop(rle: dict[str, Any], box: Sequence[float], size: int) -> UInt8[np.ndarray, "size size"]:
    """Coverage 0..255 of a mask inside its box (x1, y1, x2, y2; original pixels, fractions allowed), on size x size cells."""
    mask = rle_ops.decode(rle)
    # One pixel more on each side, for windows that reach over the border of the box.
    left, top = (max(math.floor(low) - 1, 0) for low in box[:2])
    right, bottom = (math.ceil(high) + 1 for high in box[2:])
    near = mask[top:bottom, left:right].astype(np.float32)
    rows = _window_means(near, box[1] - top, box[3] - top, size)
    coverage = _window_means(rows.T, box[0] - left, box[2] - left, size).T
    return np.round(255 * coverage).clip(0, 255).astype(np.uint8)
