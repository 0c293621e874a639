"""Drawing into images: colours are looked for at computed places."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mrcnn_jax.figures import draw
from mrcnn_jax.figures.draw import (
    CROWD,
    MISSED,
    PALETTE,
    PROPOSAL,
    RECALLED,
    SHORT_SIDE,
    draw_instances,
    draw_proposals,
    legend,
    side_by_side,
)

NAMES = {1: "cell", 5: "nucleus"}
GREY = np.full((480, 600, 3), 100, np.uint8)  # not enlarged
OBJECT: dict[str, Any] = {
    "bbox": [100, 200, 150, 120],
    "category_id": 5,
    "score": 0.9,
    "segmentation": [[110, 210, 240, 210, 240, 310, 110, 310]],
}


def _changed(image: np.ndarray, before: np.ndarray) -> np.ndarray:
    return (image != before).any(axis=-1)


def test_mask_box_and_label_are_where_the_object_is() -> None:
    image = draw_instances(GREY, [OBJECT], NAMES)
    changed = _changed(image, GREY)
    assert changed[212:308, 112:238].all()  # the mask
    np.testing.assert_allclose(image[260, 170], 0.55 * 100 + 0.45 * np.array(PALETTE[0]), atol=1)
    for place in ((260, 100), (260, 249), (319, 175)):  # left, right and bottom line of the box
        assert tuple(image[place]) == PALETTE[0]
    assert not changed[260, 103:108].any()  # between box and mask
    assert changed[180:200, 100:150].any()  # the label above the box
    outside = changed.copy()
    outside[175:325, 95:255] = False
    assert not outside.any()
    assert (GREY == 100).all()


def test_what_is_no_image_is_named() -> None:
    for image in (GREY / 255, GREY[..., 0]):
        with pytest.raises(ValueError, match=r"^image: .* is not uint8 RGB"):
            draw_instances(image, [], NAMES)


def test_labels_say_class_score_and_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance of results alone: an annotation's `depth` is the user's own."""
    written: list[str] = []
    place = draw._placed_label

    def keep(canvas: Any, text: str, *rest: Any) -> Any:
        written.append(text)
        return place(canvas, text, *rest)

    monkeypatch.setattr(draw, "_placed_label", keep)
    annotation = {key: value for key, value in OBJECT.items() if key != "score"}
    objects = [
        {**OBJECT, "depth": 0.8249},
        {**OBJECT, "score": 0.8, "depth": float("nan")},
        {**OBJECT, "score": 0.7, "depth": None},
        {**OBJECT, "score": 0.6, "depth": np.float32(12)},
        {**annotation, "depth": "third layer"},
        {**annotation, "iscrowd": 1, "depth": 3},
    ]
    draw_instances(GREY, objects, NAMES)
    assert sorted(written) == [
        "nucleus",
        "nucleus (crowd)",
        "nucleus 0.60 12.00 m",
        "nucleus 0.70",
        "nucleus 0.80",
        "nucleus 0.90 0.82 m",
    ]
    written.clear()
    draw_instances(GREY, objects[:2], NAMES, labels=["near", "far"])
    assert written == ["near", "far"]  # the best first


def test_a_mask_score_takes_the_place_of_the_score() -> None:
    """In labels, and for what is on top; an annotation's field of that name is the user's own."""
    assert draw._text({**OBJECT, "mask_score": 0.314}, NAMES) == "nucleus 0.31"
    annotation = {key: value for key, value in OBJECT.items() if key != "score"}
    assert draw._text({**annotation, "mask_score": "good"}, NAMES) == "nucleus"
    draw_instances(GREY, [{**annotation, "mask_score": "good"}], NAMES)
    pair = [{**OBJECT, "mask_score": 0.2}, {**OBJECT, "score": 0.8, "mask_score": 0.7}]
    image = draw_instances(GREY, pair, NAMES, min_score=0)
    assert tuple(image[260, 100]) == PALETTE[1]


def test_every_object_has_its_colour_and_crowds_are_grey() -> None:
    objects = [
        {**OBJECT, "bbox": [50 + 130 * i, 200, 100, 100], "segmentation": None} for i in range(3)
    ]
    objects.append({**OBJECT, "bbox": [440, 200, 100, 100], "segmentation": None, "iscrowd": 1})
    image = draw_instances(GREY, objects, NAMES)
    assert [tuple(image[250, x]) for x in (50, 180, 310, 440)] == [*PALETTE[:3], CROWD]


def test_the_best_score_is_on_top() -> None:
    objects = [{**OBJECT, "score": score, "segmentation": None} for score in (0.9, 0.3)]
    image, other = (
        draw_instances(GREY, some, NAMES, min_score=0) for some in (objects, objects[::-1])
    )
    assert tuple(image[260, 100]) == PALETTE[0]
    assert tuple(other[260, 100]) == PALETTE[1]


def test_what_is_unlikely_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mask score, if there is one; annotations have none. Colours do not depend on it."""
    written: list[tuple[str, Any]] = []
    place = draw._placed_label

    def keep(canvas: Any, text: str, corner: Any, color: Any, *rest: Any) -> Any:
        written.append((text, color))
        return place(canvas, text, corner, color, *rest)

    monkeypatch.setattr(draw, "_placed_label", keep)
    annotation = {key: value for key, value in OBJECT.items() if key != "score"}
    low, half = {**OBJECT, "score": 0.49}, {**OBJECT, "score": 0.5}
    objects = [low, half, {**OBJECT, "mask_score": 0.3}, annotation]
    draw_instances(GREY, objects, NAMES)
    assert written == [("nucleus", PALETTE[3]), ("nucleus 0.50", PALETTE[1])]
    written.clear()
    draw_instances(GREY, objects, NAMES, labels=list("abcd"), min_score=0.45)
    assert written == [("d", PALETTE[3]), ("b", PALETTE[1]), ("a", PALETTE[0])]


@pytest.mark.parametrize(
    "box", [[0, 0, 600, 480], [560, 0, 40, 20], [590, 470, 10, 10], [0, 470, 3, 3]]
)
def test_labels_stay_in_the_image(box: list[float]) -> None:
    plain = {"bbox": box, "category_id": 1, "score": 0.5}
    image = draw_instances(GREY, [plain], NAMES)
    # 60 px of text and more in black on the patch, wherever it went
    assert ((image < 60).all(axis=-1)).sum() > 60


def test_labels_of_one_place_stand_above_each_other() -> None:
    """The best one next to the box."""
    objects = [{**OBJECT, "score": score, "segmentation": None} for score in (0.3, 0.9, 0.6)]
    image = draw_instances(GREY, objects, NAMES, min_score=0)
    worst, best, middle = (
        np.flatnonzero((image[:260, 99:160] == color).all(axis=-1).sum(axis=1) > 15)
        for color in PALETTE[:3]
    )
    above = best[best < 199]
    assert min(len(above), len(middle), len(worst)) > 8
    assert worst.max() < middle.min() <= middle.max() < above.min()


def test_labels_at_the_top_stand_below_each_other() -> None:
    objects = [
        {**OBJECT, "bbox": [100, 0, 150, 120], "score": score, "segmentation": None}
        for score in (0.9, 0.6)
    ]
    best, other = (
        np.flatnonzero(
            (draw_instances(GREY, objects, NAMES)[3:60, 103:160] == c).all(axis=-1).sum(axis=1) > 15
        )
        for c in PALETTE[:2]
    )
    assert min(len(best), len(other)) > 8
    assert best.max() < other.min()


@pytest.mark.parametrize(
    ("count", "smaller", "note"), [(30, False, False), (130, True, False), (220, True, True)]
)
def test_labels_step_back_where_they_would_cover_the_image(
    count: int, smaller: bool, note: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In size, then altogether: they never cover more than a third of it."""
    drawn: list[tuple[draw._Label, draw._Style]] = []
    write = draw._draw_label

    def keep(canvas: Any, label: draw._Label, style: draw._Style) -> None:
        drawn.append((label, style))
        write(canvas, label, style)

    monkeypatch.setattr(draw, "_draw_label", keep)
    corners = np.random.default_rng(0).integers(0, 400, (count, 2)).tolist()
    objects = [
        {
            **OBJECT,
            "bbox": [x, y, 40, 40],
            "category_id": 1 + 4 * (i % 3 == 0),
            "segmentation": None,
        }
        for i, (x, y) in enumerate(corners)
    ]
    image = draw_instances(GREY, objects, NAMES)
    boxes = [label.box for label, _ in drawn]
    assert sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes) <= 1.1 * image[..., 0].size / 3
    whole = [label.text for label, _ in drawn]
    if note:
        several = sum(i % 3 == 0 for i in range(count))
        assert whole == [
            f"{count} objects, no room for labels: cell {count - several}, nucleus {several}"
        ]
        assert (image[-4:, 2:100] == 255).mean() > 0.5
    else:
        assert sorted(whole) == sorted(draw._text(one, NAMES) for one in objects)
        assert (drawn[0][1].font < draw.FONT_SCALE) == smaller


def test_small_images_are_enlarged_and_large_ones_get_larger_lines() -> None:
    small = draw_instances(
        GREY[:48, :60], [{**OBJECT, "bbox": [10, 20, 15, 12], "segmentation": None}], NAMES
    )
    assert small.shape == (SHORT_SIDE, 600, 3)
    assert tuple(small[260, 100]) == PALETTE[0]
    assert tuple(small[260, 249]) == PALETTE[0]
    large = draw_instances(
        np.zeros((1920, 1920, 3), np.uint8),
        [{**OBJECT, "bbox": [400, 800, 600, 480], "segmentation": None}],
        NAMES,
    )
    assert large.shape == (1920, 1920, 3)
    assert (large[1040, 390:410] == PALETTE[0]).all(
        axis=-1
    ).sum() >= 8  # 2 px at a short side of 480


def test_an_image_without_objects_is_left_alone() -> None:
    np.testing.assert_array_equal(draw_instances(GREY, [], NAMES), GREY)


def test_proposals_are_the_fainter_the_lower_their_score_and_truth_is_on_top() -> None:
    truth = np.array([[50.0, 50, 150, 150], [300, 300, 400, 400]])
    boxes = np.array([[200.0, 100, 300, 200], [200, 250, 280, 350], [50, 50, 150, 150]])
    image = draw_proposals(
        GREY, boxes, np.array([0.9, 0.1, 1.0]), truth, np.array([True, False])
    ).astype(int)
    assert tuple(image[100, 50]) == RECALLED
    assert tuple(image[350, 300]) == MISSED
    strong, weak = (np.abs(image[y, 200] - PROPOSAL).sum() for y in (150, 300))
    assert strong < weak
    assert (image[300, 200] != image[300, 190]).any()


def test_images_without_proposals_or_objects_can_be_drawn() -> None:
    none = draw_proposals(GREY, np.zeros((0, 4)), np.zeros(0), np.zeros((0, 4)), np.zeros(0, bool))
    np.testing.assert_array_equal(none, np.full_like(GREY, 75))


def test_side_by_side_keeps_both_images_and_titles_them() -> None:
    left, right = np.full((50, 300, 3), 10, np.uint8), np.full((80, 310, 3), 20, np.uint8)
    row = side_by_side([left, right], ["truth", "found"])
    assert (row == 10).all(axis=-1).sum() == pytest.approx(
        50 * 300, abs=60
    )  # letters may hold that grey
    assert (row == 20).all(axis=-1).sum() == pytest.approx(80 * 310, abs=60)
    for title in (row[:30, :310], row[:30, 320:]):
        assert (title < 100).any()


def test_long_titles_are_written_smaller() -> None:
    row = side_by_side(
        [np.full((40, 200, 3), 10, np.uint8)] * 2,
        ["a title that is far longer than 200 pixels are wide", "short"],
    )
    ink = np.flatnonzero((row[:30, :212] < 128).any(axis=(0, 2)))
    assert 150 < ink[-1] < 207
    assert (row[30:70, 6:206] == 10).all()
    assert (row[30:70, 218:418] == 10).all()


def test_a_legend_names_its_colours_in_as_many_lines_as_it_needs() -> None:
    colors = {"first": (1, 2, 3), "second, which is much longer": (4, 5, 6), "third": (7, 8, 9)}
    wide, narrow = legend(colors, 900), legend(colors, 300)
    assert narrow.shape[0] > wide.shape[0]
    for page in (wide, narrow):
        for color in colors.values():
            assert (page == color).all(axis=-1).sum() > 150


def test_every_pixel_of_a_mask_is_tinted_and_no_other() -> None:
    """A ragged mask with holes, at the image's border, on noise. Outlines, blended over two pixels,
    and the label's corner are left out."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 256, (SHORT_SIDE, 700, 3)).astype(np.uint8)
    mask = np.zeros(before.shape[:2], np.uint8)
    mask[100:, 300:] = cv2.resize(
        rng.integers(0, 2, (19, 20)).astype(np.uint8), (400, 380), interpolation=cv2.INTER_NEAREST
    )
    rle = coco_mask.encode(np.asfortranarray(mask))
    after = draw_instances(
        before, [{"bbox": [0, 0, 5, 5], "category_id": 1, "segmentation": rle}], NAMES
    )
    beyond = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    near_an_outline = cv2.dilate(mask, np.ones((5, 5)), **beyond) != cv2.erode(
        mask, np.ones((5, 5)), **beyond
    )
    near_an_outline[:60, :120] = True
    for inside in (False, True):
        here = (mask == inside) & ~near_an_outline
        assert here.sum() > 20_000
        expected = (
            np.floor(0.55 * before[here] + 0.45 * np.array(PALETTE[0])) if inside else before[here]
        )
        np.testing.assert_array_equal(after[here], expected)
