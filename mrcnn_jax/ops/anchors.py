"""Anchor boxes: constants of a grid, made by NumPy while a program is traced."""

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
    """Makes the anchors of a feature map (Ren et al. 2015, section 3.1.1).

    Args:
        grid: (rows, columns) of the map.
        stride: (y, x) pixels between cells.
        scales: square roots of the areas, in pixels.
        ratios: height / width.
        offset: anchors are centred at (i + offset) * stride; 0.5 is the middle of a cell.
        whole_pixels: round the distances of the sides from the centre, halves to even
            (torchvision).

    Returns:
        Boxes (x1, y1, x2, y2) in pixels, ordered by row, column, scale, ratio.
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
