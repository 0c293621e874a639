"""Figures of the targets: boxes have their colours at the places that they are at, and titles count
them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mrcnn_jax.figures.png_pages import PAGE_WIDTH
from mrcnn_jax.figures.targets import (
    BEYOND,
    NEGATIVE,
    POSITIVE,
    SHOWN_NEGATIVES,
    TRUTH,
    box_targets_figure,
    class_color,
    rpn_targets_figure,
)
from mrcnn_jax.figures.views import BoxTargets, Canvas, LevelTargets
from tests.figures.pages import read_page

NONE = np.zeros((0, 4))
CANVAS = Canvas(np.full((100, 100, 3), 40, np.uint8), np.array([[20.0, 20, 60, 60]]))


def _has(cell: np.ndarray, x: float, y: float, color: tuple[int, int, int]) -> bool:
    """Whether the colour is within 2 px of a place."""
    x, y = round(x), round(y)
    return bool((cell[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] == color).all(axis=-1).any())


def test_anchors_of_each_level_in_its_panel(tmp_path: Path, titles: list[str]) -> None:
    positive, negative = np.array([[25.0, 25, 65, 65]]), np.array([[70.0, 5, 90, 25]])
    levels = [LevelTargets(f"P{level}", NONE, NONE, 0, 0) for level in range(2, 7)]
    levels[1] = LevelTargets("P3", positive, np.tile(negative, (30, 1)), 4, 500)
    levels[4] = LevelTargets(
        "P6", np.array([[-10.0, -10, 110, 110]]), NONE, 1, 0
    )  # it reaches 10 px beyond the image
    (path,) = rpn_targets_figure([(CANVAS, levels)], tmp_path)
    page = read_page(path)
    assert page.shape[1] == PAGE_WIDTH
    assert titles == ["ground truth (1)"] + [
        f"P{level}: {title}"
        for level, title in (
            (2, "0 of 0 positive, 0 of 0 negative"),
            (3, "1 of 4 positive, 30 of 500 negative"),
            (4, "0 of 0 positive, 0 of 0 negative"),
            (5, "0 of 0 positive, 0 of 0 negative"),
            (6, "1 of 1 positive, 0 of 0 negative"),
        )
    ]
    top = page.shape[0] - 2 * (30 + 388 + 6)
    cells = [
        page[top + row * 424 + 30 :, column * 400 + 6 :][:388, :388]
        for row in range(2)
        for column in range(3)
    ]
    scale = 388 / 120  # 100 px of image, 10 px of margin

    def has(panel: int, x: float, y: float, color: tuple[int, int, int]) -> bool:
        return _has(cells[panel], (x + 10) * scale, (y + 10) * scale, color)

    for panel in range(6):
        assert has(panel, 20, 50, TRUTH)
        assert has(panel, -5, 50, BEYOND)
        assert has(panel, 65, 45, POSITIVE) == (panel == 2)
        assert has(panel, 90, 15, NEGATIVE) == (panel == 2)
        assert has(panel, -10, 50, POSITIVE) == has(panel, 50, 110, POSITIVE) == (panel == 5)


def test_of_the_negative_anchors_some_are_drawn(tmp_path: Path) -> None:
    places = np.array([[40.0 * i, 0, 40 * i + 30, 30] for i in range(SHOWN_NEGATIVES + 2)])
    canvas = Canvas(np.zeros((40, 40 * len(places), 3), np.uint8), NONE)
    page = read_page(
        rpn_targets_figure([(canvas, [LevelTargets("C4", NONE, places, 0, 99)])], tmp_path)[0]
    )
    cell = page[-(6 + round(588 * 40 / canvas.image.shape[1])) :, 606:]
    scale = 588 / canvas.image.shape[1]
    assert [_has(cell, (40 * i + 15) * scale, 0, NEGATIVE) for i in range(len(places))] == [
        True
    ] * SHOWN_NEGATIVES + [False] * 2


def test_boxes_have_the_colour_of_their_class_and_show_where_they_go(
    tmp_path: Path, titles: list[str]
) -> None:
    boxes = np.array([[30.0, 30, 80, 80], [5, 5, 20, 15]])
    taken_to = np.array([[20.0, 20, 60, 60], [0, 0, 90, 90]])
    (path,) = box_targets_figure(
        [(CANVAS, BoxTargets(boxes, np.array([2, 0]), taken_to))], ["tree", "house"], tmp_path
    )
    page = read_page(path)
    assert page.shape[1] == PAGE_WIDTH
    assert titles == [
        "2 boxes: 1 foreground, 1 background",
        "the foreground, and where its targets take it",
    ]
    left, right = page[-(588 + 6) : -6, 6:594], page[-(588 + 6) : -6, 606:1194]
    house, scale = class_color(2), 5.88
    assert class_color(1) != house
    for cell in (left, right):
        assert _has(cell, 80 * scale, 55 * scale, house)
    assert _has(left, 5 * scale, 10 * scale, NEGATIVE)
    assert not _has(left, 20 * scale, 40 * scale, TRUTH)
    assert _has(right, 20 * scale, 40 * scale, TRUTH)
    assert _has(right, 60 * scale, 40 * scale, TRUTH)
    assert not _has(right, 90 * scale, 45 * scale, TRUTH)  # the background goes nowhere
    assert not _has(right, 5 * scale, 10 * scale, NEGATIVE)
    # The arrow from corner to corner, half way.
    line = np.abs(right[round(25 * scale), round(25 * scale)].astype(int) - house).sum()
    assert line < 60
    assert (left[round(25 * scale), round(25 * scale)] == 30).all()
    legend = page[: page.shape[0] - 588 - 36]
    assert (legend == house).all(axis=-1).sum() > 150
    assert not (legend == class_color(1)).all(axis=-1).any()
