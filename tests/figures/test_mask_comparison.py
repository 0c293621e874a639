"""Masks beside each other: what is right and wrong of them is coloured where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mrcnn_jax.figures.mask_comparison import AGREED, EXCESS, LACKING, masks_figure, zoomed_region
from mrcnn_jax.figures.png_pages import PAGE_WIDTH
from tests.figures.pages import read_page

GREY = 100


def _rle(rows: slice, columns: slice) -> dict[str, Any]:
    mask = np.zeros((200, 300), np.uint8, order="F")
    mask[rows, columns] = 1
    return coco_mask.encode(mask)


def test_masks_are_zoomed_to_the_object_and_compared_with_it(
    tmp_path: Path, titles: list[str]
) -> None:
    """The object: 40 x 40 pixels. One run sees it 10 px too far right, the other sees its upper
    half."""
    image = np.full((200, 300, 3), GREY, np.uint8)
    truth = {
        "bbox": [100, 50, 40, 40],
        "category_id": 7,
        "segmentation": _rle(slice(50, 90), slice(100, 140)),
    }
    masks = {
        "moved": [_rle(slice(50, 90), slice(110, 150))],
        "half": [_rle(slice(50, 70), slice(100, 140))],
    }
    (path,) = masks_figure([image], [truth], masks, {7: "tree"}, tmp_path)
    assert titles == [
        "ground truth: tree",
        "moved: mask IoU 0.60",
        "half: mask IoU 0.50",
    ]  # 30 / 50 and 20 / 40 columns or rows
    page = read_page(path)
    assert page.shape[1] == PAGE_WIDTH
    cells = [page[62 : 62 + 388, 400 * column + 6 : 400 * column + 394] for column in range(3)]
    # The region is 56 x 56 pixels from (92, 42).
    assert zoomed_region(truth["bbox"], (200, 300)) == (slice(42, 98), slice(92, 148))

    def color(cell: np.ndarray, x: int, y: int) -> np.ndarray:
        """At the middle of a pixel of the image."""
        return cell[round((y - 42 + 0.5) * 388 / 56), round((x - 92 + 0.5) * 388 / 56)]

    plain, expected = (
        0.75 * GREY,
        {name: 0.55 * 0.75 * GREY + 0.45 * np.array(name) for name in (AGREED, EXCESS, LACKING)},
    )
    truth_cell, moved, half = cells
    for x, y, cell, value in (
        (105, 80, truth_cell, expected[AGREED]),
        (145, 80, truth_cell, plain),
        (105, 80, moved, expected[LACKING]),
        (120, 80, moved, expected[AGREED]),
        (145, 80, moved, expected[EXCESS]),
        (95, 80, moved, plain),
        (120, 60, half, expected[AGREED]),
        (120, 80, half, expected[LACKING]),
    ):
        np.testing.assert_allclose(color(cell, x, y), np.broadcast_to(value, 3), atol=2)


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([0, 0, 300, 200], (slice(0, 200), slice(0, 300))),
        ([290.5, 190.5, 5, 5], (slice(182, 200), slice(282, 300))),  # 8 px at least
        ([100, 100, 50, 10], (slice(90, 120), slice(90, 160))),  # a fifth of the longer side
    ],
)
def test_the_zoomed_region_holds_the_object_and_stays_in_the_image(
    bbox: list[float], expected: tuple[slice, slice]
) -> None:
    assert zoomed_region(bbox, (200, 300)) == expected
