"""Detections and proposals beside the ground truth: pages are read back from their PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mrcnn_jax.figures.comparison import detections_figure, proposals_figure
from mrcnn_jax.figures.draw import MISSED, RECALLED
from mrcnn_jax.figures.png_pages import PAGE_WIDTH
from tests.figures.pages import read_page

SIZES = ((60, 90), (200, 120), (600, 2000), (64, 64), (48, 60))


def _images() -> list[np.ndarray]:
    return [np.full((*size, 3), 90, np.uint8) for size in SIZES]


def test_detections_are_drawn_in_pages_beside_the_ground_truth(tmp_path: Path) -> None:
    result: dict[str, Any] = {"bbox": [10, 20, 30, 25], "category_id": 2}
    found = (
        [{**result, "score": 0.4}],
        [{**result, "score": 0.8}],
        [],
        [],
        [{**result, "score": 0.8}],
    )
    paths = detections_figure(
        _images(), [[result]] + [[]] * 4, {"run": found}, {2: "tree"}, tmp_path / "figures"
    )
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "figures/detections_1.png",
        "figures/detections_2.png",
    ]
    first, second = (read_page(path) for path in paths)
    assert first.shape[1] == PAGE_WIDTH
    # Row 1 is 392 px high below its title. The truth is drawn left; the detection under the score
    # is not drawn right.
    left, right = first[40:420, 20:580], first[40:420, 620:1180]
    assert len(np.unique(left.reshape(-1, 3), axis=0)) > 2
    assert len(np.unique(right.reshape(-1, 3), axis=0)) == 1
    assert second.shape[0] == (588 + 36) + (470 + 36)


def test_proposals_show_what_they_reach(tmp_path: Path) -> None:
    truth = np.array([[5.0, 5, 25, 25], [30, 30, 44, 44]])
    boxes = np.array([[5.0, 5, 25, 24], [0, 0, 9, 9]])
    none = np.zeros((0, 4))
    found = [(boxes, np.array([0.9, 0.2]))] + [(none, np.zeros(0))] * 4
    paths = proposals_figure(_images(), {"run": found}, [truth] + [none] * 4, tmp_path)
    assert [path.name for path in paths] == ["proposals_1.png"]
    page = read_page(paths[0])
    assert page.shape[1] == PAGE_WIDTH
    # Image 1 is 588 px wide, 6 px from the left and, below the colours and its title, 62 px from
    # the top.
    scale = 588 / 90
    assert tuple(page[62 + round(scale * 15), 6 + round(scale * 5)]) == RECALLED
    assert tuple(page[62 + round(scale * 37), 6 + round(scale * 30)]) == MISSED


def test_runs_stand_side_by_side_on_the_same_image(tmp_path: Path, titles: list[str]) -> None:
    """Run 1 reaches object 1, run 2 object 2."""
    truth = np.array([[5.0, 5, 25, 25], [30, 30, 44, 44]])
    columns = {name: [(truth[[i]], np.ones(1))] for i, name in enumerate(("one", "two"))}
    rng = np.random.default_rng(0)
    (path,) = proposals_figure(
        [rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)], columns, [truth], tmp_path
    )
    page = read_page(path)
    assert page.shape[1] == PAGE_WIDTH
    left, right = page[62:454, 6:594], page[62:454, 606:1194]
    differ = (left != right).any(axis=-1)
    scale, edges = 588 / 90, np.zeros_like(differ)
    for x1, y1, x2, y2 in np.round(truth * scale).astype(int):
        edges[y1 - 3 : y2 + 3, x1 - 3 : x2 + 3] = True
        edges[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3] = False
    assert not differ[~edges].any()
    assert differ[edges].any()
    assert (
        tuple(left[round(scale * 15), round(scale * 5)])
        == RECALLED
        == tuple(right[round(scale * 37), round(scale * 30)])
    )
    assert (
        tuple(right[round(scale * 15), round(scale * 5)])
        == MISSED
        == tuple(left[round(scale * 37), round(scale * 30)])
    )
    assert titles == [
        "one: 1 proposals, 1 of 2 objects reached",
        "two: 1 proposals, 1 of 2 objects reached",
    ]
