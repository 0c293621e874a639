"""Cells stand in their rows and columns, padded with white."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mrcnn_jax.figures.png_pages import drawn_size, write_pages
from tests.figures.pages import read_page


def test_cells_fill_pages_row_by_row(tmp_path: Path) -> None:
    sizes = [(10, 20), (30, 20), (10, 5), (10, 20), (7, 9)]
    cells = [np.full((*size, 3), 10 * i, np.uint8) for i, size in enumerate(sizes)]
    paths = write_pages(cells, tmp_path / "new", "name", rows=2, columns=2)
    assert [path.name for path in paths] == ["name_1.png", "name_2.png"]
    first, second = (read_page(path) for path in paths)
    expected = np.full((30 + 10, 20 + 20, 3), 255, np.uint8)
    for cell, (y, x) in zip(cells, ((0, 0), (0, 20), (30, 0), (30, 20)), strict=False):
        expected[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, cells[4])
    (tmp_path / "new" / "name_10.png").touch()
    assert write_pages(cells[:1], tmp_path / "new", "name", rows=2, columns=2) == paths[:1]
    left = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert left == ["name_1.png", "name_10.png"]  # of the earlier pages, and somebody else's


def test_colours_are_explained_above_the_cells(tmp_path: Path) -> None:
    cells = [np.zeros((40, 300, 3), np.uint8)]
    (path,) = write_pages(cells, tmp_path, "name", rows=1, colors={"a colour": (1, 200, 3)})
    page = read_page(path)
    np.testing.assert_array_equal(page[-40:], cells[0])
    assert (page[:-40] == (1, 200, 3)).all(axis=-1).sum() > 150


def test_the_longer_side_of_an_image_fills_its_column() -> None:
    assert drawn_size(np.zeros((50, 100, 3), np.uint8), 2) == (294, 588)
    assert drawn_size(np.zeros((100, 50, 3), np.uint8), 2) == (588, 294)
    assert drawn_size(np.zeros((1, 2000, 3), np.uint8), 3) == (1, 388)
