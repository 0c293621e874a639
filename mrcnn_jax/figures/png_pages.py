"""Pages of a figure: how large an image is drawn in a column, and rows of images as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from mrcnn_jax.figures.draw import MARGIN, Color, Image, legend

PAGE_WIDTH = 1200  # pixels: text is still read where a page is shown at 1000


def column_width(columns: int) -> int:
    """Pixels for an image in each of so many columns."""
    return PAGE_WIDTH // columns - 2 * MARGIN


def drawn_size(image: Image, columns: int) -> tuple[int, int]:
    """(height, width) of an image in a column: it fills the width, or is as high as the column is
    wide."""
    scale = column_width(columns) / max(image.shape[:2])
    return max(round(image.shape[0] * scale), 1), max(round(image.shape[1] * scale), 1)


def write_pages(
    cells: Sequence[Image],
    out_dir: Path,
    name: str,
    *,
    rows: int,
    columns: int = 1,
    colors: Mapping[str, Color] | None = None,
) -> list[Path]:
    """`<name>_1.png`, ... of `rows` x `columns` cells, each padded with white to the largest of its
    row and page.

    Args:
        colors: what colours mean; shown above the cells of each page.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, len(cells), rows * columns), start=1):
        here = cells[start : start + rows * columns]
        width = max(cell.shape[1] for cell in here)
        lines = [legend(colors, width * min(columns, len(here)))] if colors else []
        for row in range(0, len(here), columns):
            line = list(here[row : row + columns])
            line += [np.zeros((0, 0, 3), np.uint8)] * (min(columns, len(here)) - len(line))
            height = max(cell.shape[0] for cell in line)
            lines.append(np.concatenate([_padded(cell, height, width) for cell in line], axis=1))
        paths.append(out_dir / f"{name}_{number}.png")
        paths[-1].write_bytes(cv2.imencode(".png", np.concatenate(lines)[..., ::-1])[1].tobytes())
    return paths


def _padded(image: Image, height: int, width: int) -> Image:
    return np.pad(
        image,
        ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)),
        constant_values=255,
    )
