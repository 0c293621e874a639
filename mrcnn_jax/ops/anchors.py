"""Anchor boxes: constants of a grid, made by NumPy when a program is traced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def level_anchors(
    *,
    grid: tuple[int, int],
    stride: tuple[float, float],
    scales: Sequence[float],
    ratios: Sequence[float],
    offset: float = 0.5,
    whole_pixels: bool = False,
) -> Float32[np.ndarray, "n 4"]:
    """Anchors of a feature map of `grid` = (rows, columns) cells, `stride` = (y, x) pixels apart,
    ordered by row, column, scale, ratio.

    Each is centred at (i + offset) * stride: 0.5 is the middle of its cell. It has an area of scale
    ** 2 square pixels and height : width = ratio; whole_pixels: the distances of its sides from its
    centre are rounded (half to even), as in torchvision.
    """
    rows, columns = grid
    root = np.sqrt(np.asarray(ratios, np.float64))
    shape = np.stack([1 / root, root], axis=-1)  # [ratio, (x, y)]
    half = (np.asarray(scales, np.float64)[:, None, None] * shape).reshape(-1, 2) / 2
    if whole_pixels:
        half = np.round(half)
    y, x = np.meshgrid(
        (np.arange(rows) + offset) * stride[0],
        (np.arange(columns) + offset) * stride[1],
        indexing="ij",
    )
    centre = np.stack([x, y], axis=-1)[:, :, None]  # [rows, columns, 1, (x, y)]
    return np.concatenate([centre - half, centre + half], axis=-1).reshape(-1, 4).astype(np.float32)
