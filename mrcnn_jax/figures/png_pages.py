"""Lay out the pages of a figure: images in columns and rows, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mrcnn_jax.figures.draw import MARGIN, Color, Image, legend, side_by_side
from mrcnn_jax.pixels.encode import write_image

PAGE_WIDTH = 1200  # pixels: text stays legible where a page is shown at 1000


def drawn_size(image: Image, columns: int) -> tuple[int, int]:
    """(height, width) at which an image's longer side is as long as one of `columns` is wide."""
    scale = _column_width(columns) / max(image.shape[:2])
    return max(round(image.shape[0] * scale), 1), max(round(image.shape[1] * scale), 1)


def row_of_columns(images: Sequence[Image], titles: Sequence[str], columns: int) -> Image:
    """Put titled images side by side, each in one of `columns` on the page."""
    return side_by_side(images, titles, _column_width(columns))


def write_pages(
    cells: Sequence[Image],
    out_dir: Path,
    name: str,
    *,
    rows: int,
    columns: int = 1,
    colors: Mapping[str, Color] | None = None,
) -> list[Path]:
    """Write cells to `<name>_1.png`, `<name>_2.png`, ..., with `rows` x `columns` on each page.

    Args:
        cells: images; padded with white to the height of their row and the width of their page.
        out_dir: folder of the pages, created if need be.
        name: of the figure.
        rows: of a page.
        columns: of a page.
        colors: a legend above the cells of each page: text -> colour.

    Returns:
        The pages. Further ones of an earlier call are removed.
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
        write_image(paths[-1], np.concatenate(lines))
    further = itertools.count(len(paths) + 1)
    for path in itertools.takewhile(Path.exists, (out_dir / f"{name}_{n}.png" for n in further)):
        path.unlink()
    return paths


def _column_width(columns: int) -> int:
    return PAGE_WIDTH // columns - 2 * MARGIN


def _padded(image: Image, height: int, width: int) -> Image:
    return np.pad(
        image,
        ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)),
        constant_values=255,
    )
