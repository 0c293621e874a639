"""Maps of depth in colours, their scale, and the page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mrcnn_jax.figures import depth_maps, draw
from mrcnn_jax.figures.depth_maps import (
    UNKNOWN,
    DepthExample,
    depth_colours,
    depth_figure,
    depth_limits,
    scale_bar,
)
from mrcnn_jax.figures.png_pages import PAGE_WIDTH
from tests.figures.pages import read_page

NAMES = {3: "cup", 5: "box"}


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is written below scales, and where each text has its left."""
    written: list[tuple[str, int]] = []
    put = cv2.putText

    def keep(image: Any, text: str, at: tuple[int, int], *rest: Any) -> Any:
        written.append((text, at[0]))
        return put(image, text, at, *rest)

    monkeypatch.setattr(depth_maps.cv2, "putText", keep)
    return written


def _lightness(colours: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[..., 0].astype(int)


def test_near_is_lighter_than_far_and_beyond_the_limits_are_their_colours() -> None:
    metres = np.linspace(0.5, 3, 26)[None]
    light = _lightness(depth_colours(metres, (1.0, 2.0)))[0]
    inside = light[5:16]
    assert (np.diff(inside) < 0).all()
    assert inside[0] - inside[-1] > 150
    assert (light[:5] == inside[0]).all()
    assert (light[16:] == inside[-1]).all()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_unknown_depth_is_striped_grey_which_no_depth_is(value: float) -> None:
    metres = np.full((20, 30), 1.5)
    metres[5:, 10:] = value
    colours = depth_colours(metres, (1.0, 2.0))
    grey = (colours == colours[..., :1]).all(axis=-1)
    np.testing.assert_array_equal(grey, metres != 1.5)
    assert {tuple(color) for color in colours[grey].tolist()} == set(UNKNOWN)
    scale = depth_colours(np.linspace(1, 2, 256)[None], (1.0, 2.0)).astype(int)
    assert (np.ptp(scale, axis=-1) > 40).all()


def test_limits_are_those_of_nearly_all_known_pixels() -> None:
    metres = np.linspace(1, 2, 1001)
    metres[0], metres[-1] = 1e-3, 900
    near, far = depth_limits(np.concatenate([metres, np.zeros(500), np.full(500, np.nan)]))
    assert (near, far) == pytest.approx((1.01, 1.99), abs=0.002)
    assert depth_limits(np.full(5, 2.0)) == (2.0, 2.01)
    assert depth_limits(np.zeros(5)) == (0.0, 1.0)


def test_a_scale_has_round_metres_at_their_places(ticks: list[tuple[str, int]]) -> None:
    bar = scale_bar((0.47, 1.02), 551)
    ends = depth_colours(np.array([[0.47, 1.02]]), (0.47, 1.02))
    np.testing.assert_array_equal(bar[5, [0, -1]], ends[0])
    values = [float(text.removesuffix(" m")) for text, _ in ticks]
    assert all(text.endswith(" m") for text, _ in ticks)
    assert len(values) >= 4
    np.testing.assert_allclose(np.diff(values), values[1] - values[0])
    assert 0.47 <= values[0] < values[-1] <= 1.02
    for value in values:  # a mark below the bar: 1 mm is a pixel
        assert (bar[15, round(1000 * (value - 0.47))] == 0).all()
    lefts = [left for _, left in ticks]
    assert min(np.diff(lefts)) > 40
    assert min(lefts) >= 0


@pytest.mark.parametrize("limits", [(-0.002, 0.002), (0.0, 1e-3), (2.0, 2.01), (0.5, 80.0)])
def test_scales_of_any_range_have_values(
    limits: tuple[float, float], ticks: list[tuple[str, int]]
) -> None:
    for width in (30, 110, 288, 588):
        ticks.clear()
        assert scale_bar(limits, width).shape == (38, width, 3)
        values = [float(text.removesuffix(" m")) for text, _ in ticks]
        assert all(limits[0] - 1e-9 <= value <= limits[1] + 1e-9 for value in values)
        assert len(values) >= (1 if width < 200 else 2)


def _object(left: int, category: int, **more: Any) -> dict[str, Any]:
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[20:40, left : left + 20] = 1
    rle = coco_mask.encode(mask)
    return {"bbox": [left, 20, 20, 20], "category_id": category, "segmentation": rle} | more


def _example() -> DepthExample:
    """Two objects on a far wall; the prediction is 10 cm too near on the left and too far on the
    right."""
    true = np.full((60, 80), 2.0, np.float32)
    true[20:40, 10:30], true[20:40, 50:70] = 0.8, 1.2
    predicted = true.copy()
    predicted[:, :40] -= 0.1
    predicted[:, 40:] += 0.1
    true[50:], predicted[:10] = 0, np.nan
    found = [
        _object(10, 3, score=0.9, depth=0.7),
        _object(50, 5, score=0.8, depth=float("nan")),
        _object(30, 5, score=0.3, depth=1.0),
    ]
    image = np.full((60, 80, 3), 90, np.uint8)
    objects = [_object(10, 3), _object(50, 5), _object(30, 5, segmentation=None, iscrowd=1)]
    return DepthExample("a.png", image, true, predicted, objects, found)


def test_a_page_shows_maps_scales_and_distances(
    tmp_path: Path,
    titles: list[str],
    ticks: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels: list[str] = []
    place = draw._placed_label

    def keep(canvas: Any, text: str, *rest: Any) -> Any:
        labels.append(text)
        return place(canvas, text, *rest)

    monkeypatch.setattr(draw, "_placed_label", keep)
    example = _example()
    (path,) = depth_figure([example], NAMES, tmp_path / "new")
    assert path.name == "depth_1.png"
    assert titles == [
        "a.png",
        "true depth",
        "predicted depth: AbsRel 0.064",  # (400 / 8 + 400 / 12 + 2400 / 20) / 3200
        "error: blue is too near, red too far",
        "ground truth (3), true distance",
        "found, score >= 0.5 (2), predicted distance",
    ]
    assert labels == ["box (crowd)", "box 1.20 m", "cup 0.80 m", "cup 0.70 m", "box"]

    page = read_page(path)
    assert page.shape[1] == PAGE_WIDTH
    # Below the legend and the titles, the maps are 288 x 216 pixels, 3.6 for each of the image's.
    top = next(y for y in range(page.shape[0]) if (page[y, 20] == 90).all())
    cells = [page[top : top + 216, left + 6 : left + 294] for left in (0, 300, 600, 900)]
    at = {"cup": (108, 72), "box": (108, 216), "wall": (60, 150)}
    for cell, metres in ((cells[1], example.true), (cells[2], example.predicted)):
        for y, x in at.values():
            value = metres[int(y / 3.6), int(x / 3.6)]
            expected = depth_colours(np.array([[value]]), (0.8, 2.0))[0, 0]
            np.testing.assert_array_equal(cell[y, x], expected)
    for cell, y in ((cells[1], 200), (cells[2], 10), (cells[3], 200), (cells[3], 10)):
        assert tuple(cell[y, 150].tolist()) in UNKNOWN
    error = cells[3].astype(int)
    assert error[at["cup"]][2] > error[at["cup"]][0] + 50  # blue: too near
    assert error[at["box"]][0] > error[at["box"]][2] + 50

    # One scale below both maps, from 0.8 m at its left to 2 m; and that of the error.
    y = top + 216 + 6 + 5
    ends = depth_colours(np.array([[0.8, 2.0]]), (0.8, 2.0))[0]
    np.testing.assert_array_equal(page[y, [306, 893]], ends)
    assert (page[y, 6:300] == 255).all()
    texts = [text for text, _ in ticks]
    assert "1.2 m" in texts
    assert "0 m" in texts[texts.index("2 m") :]


def test_images_without_depth_or_objects_are_drawn(tmp_path: Path, titles: list[str]) -> None:
    image, none = np.full((30, 90, 3), 90, np.uint8), np.full((30, 90), np.nan, np.float32)
    blank = DepthExample("b.png", image, np.zeros_like(none), none, [], [])
    predicted = DepthExample("c.png", image, np.zeros_like(none), np.ones_like(none), [], [])
    paths = depth_figure([blank, predicted, blank], NAMES, tmp_path)
    assert [path.name for path in paths] == ["depth_1.png", "depth_2.png"]
    assert titles[2] == "predicted depth"
