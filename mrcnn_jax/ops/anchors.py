"""Anchor boxes: constants of a grid, made by NumPy when a program is traced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def level_anchors(*, grid: tuple[int, int], stride: int, scale: float, ratios: Sequence[float]) -> Float32[np.ndarray, "n 4"]:
    """Anchors of a feature map of `grid` = (rows, columns) cells, `stride` pixels apart, ordered by row, column, ratio.

    Each is centred in its cell, at (i + 0.5) * stride, has an area of scale ** 2 square pixels, and height : width = ratio.
    """
    rows, columns = grid
    root = np.sqrt(np.asarray(ratios, np.float64))
    half = np.stack([scale / root, scale * root], axis=-1) / 2  # [A, (x, y)]
    y, x = np.meshgrid((np.arange(rows) + 0.5) * stride, (np.arange(columns) + 0.5) * stride, indexing="ij")
    centre = np.stack([x, y], axis=-1)[:, :, None]  # [rows, columns, 1, (x, y)]
    return np.concatenate([centre - half, centre + half], axis=-1).reshape(-1, 4).astype(np.float32)
