"""Detections of tiles merged, against those of the whole image.

The detector sees perfectly (tests/inference/perfect.py): what is merged wrongly shows.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mrcnn_jax.inference.merging import Merged, detections, in_image, merge
from mrcnn_jax.inference.results import Detections
from mrcnn_jax.pixels.rle import encoded
from mrcnn_jax.pixels.windows import Window, windows
from tests.inference.perfect import CATEGORIES, as_set, seen


def in_tiles(scene: np.ndarray, tile: int, overlap: int) -> tuple[Detections, Merged]:
    """The depth of a detection is the area that its tile shows of the object."""
    places = windows(scene.shape, tile, overlap)
    found = []
    for number, w in enumerate(places):
        here = seen(scene[w.y1 : w.y2, w.x1 : w.x2])
        here = replace(here, depths=np.array(coco_mask.area(list(here.masks)), np.float32))
        found += in_image(here, number, w, scene.shape)
    merged = merge(found, places, scene.shape)
    return detections(merged.objects, scene.shape, CATEGORIES, depths=True), merged


def drawn(shapes: list[tuple[int, int, int, int, int]], size: tuple[int, int]) -> np.ndarray:
    """Ellipses and rectangles, each of a colour of its own, the later ones above."""
    scene = np.zeros(size, np.uint8)
    for colour, (y, x, height, width, kind) in enumerate(shapes, 1):
        centre, axes = (x, y), (width, height)
        if kind:
            cv2.ellipse(scene, centre, axes, 0, 0, 360, colour, cv2.FILLED)
        else:
            low, high = (x - width, y - height), (x + width, y + height)
            cv2.rectangle(scene, low, high, colour, cv2.FILLED)
    return scene


SHAPES = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.integers(0, 260),
        st.integers(2, 60),
        st.integers(2, 90),
        st.integers(0, 1),
    ),
    max_size=12,
)


@example([(120, 150, 50, 90, 1), (20, 40, 12, 30, 0)], 96, 32)
@given(SHAPES, st.integers(48, 300), st.integers(12, 40))
@settings(deadline=None, max_examples=60)
def test_a_scene_in_tiles_is_the_scene_in_one_piece(
    shapes: list[tuple[int, int, int, int, int]], tile: int, overlap: int
) -> None:
    """Equal to the pixel where no object hides another: smaller than the overlap, larger than
    tiles, at all borders and corners. Of pieces, the largest one's depth."""
    alone: list[tuple[int, int, int, int, int]] = []
    for shape in shapes:
        before = drawn(alone, (200, 260)) > 0
        if not (before & (drawn([shape], (200, 260)) > 0)).any():
            alone.append(shape)
    scene = drawn(alone, (200, 260))
    found, merged = in_tiles(scene, tile, overlap)
    assert as_set(found) == as_set(seen(scene))
    assert merged.cut == 0
    assert (np.diff(found.scores) <= 0).all()
    places = windows(scene.shape, tile, overlap)
    for score, depth in zip(found.scores, found.depths, strict=True):
        colour = round(1000 * (1 - float(score)))
        shown = [(scene[w.y1 : w.y2, w.x1 : w.x2] == colour).sum() for w in places]
        assert depth == max(shown)


def test_an_object_on_four_tiles_is_one() -> None:
    """Cut in each of them, and in all of them larger than what they share."""
    scene = np.zeros((160, 160), np.uint8)
    cv2.circle(scene, (80, 80), 60, 3, cv2.FILLED)
    places = windows(scene.shape, 96, 32)
    assert len(places) == 4
    found, merged = in_tiles(scene, 96, 32)
    assert (merged.joined, merged.repeated, merged.cut) == (1, 0, 0)
    [mask] = found.masks
    np.testing.assert_array_equal(coco_mask.decode(mask), scene > 0)
    assert found.boxes.tolist() == [[20, 20, 141, 141]]


def test_an_object_in_the_overlap_is_seen_whole_and_once() -> None:
    """Twice as a whole; and cut in one tile, whole in the other."""
    scene = np.zeros((64, 160), np.uint8)
    cv2.circle(scene, (80, 20), 8, 3, cv2.FILLED)
    cv2.circle(scene, (62, 50), 9, 6, cv2.FILLED)
    found, merged = in_tiles(scene, 96, 32)
    assert as_set(found) == as_set(seen(scene))
    assert (merged.joined, merged.repeated, merged.cut) == (0, 2, 0)


def test_touching_objects_of_a_class_stay_apart() -> None:
    """Side by side across a border, above each other along it."""
    scene = np.zeros((160, 160), np.uint8)
    for colour, (y1, x1, y2, x2) in {
        3: (10, 20, 40, 150),
        6: (40, 20, 70, 150),
        9: (70, 20, 150, 80),
        12: (70, 80, 150, 150),
    }.items():
        scene[y1:y2, x1:x2] = colour
    found, merged = in_tiles(scene, 96, 24)
    assert as_set(found) == as_set(seen(scene))
    assert len(found.scores) == 4
    assert merged.cut == 0


def test_one_tile_is_left_as_it_is() -> None:
    """Also what a detector sees twice there."""
    scene = np.zeros((80, 90), np.uint8)
    cv2.circle(scene, (40, 40), 20, 3, cv2.FILLED)
    twice = seen(scene)
    both = [*in_image(twice, 0, Window(0, 0, 80, 90), scene.shape)] * 2
    merged = merge(both, [Window(0, 0, 80, 90)], scene.shape)
    assert len(merged.objects) == 2
    assert (merged.joined, merged.repeated, merged.cut) == (0, 0, 0)


def box_found(
    window: Window, label: int, box: tuple[int, int, int, int], score: float
) -> Detections:
    """One rectangle, in pixels of the tile."""
    mask = np.zeros(window.size, bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = True
    return Detections(
        size=window.size,
        boxes=np.array([box], np.float64),
        labels=np.array([label], np.int32),
        category_ids=(5,),
        class_names=("disc",),
        scores=np.array([score], np.float32),
        masks=tuple(encoded([mask])),
    )


LEFT, RIGHT, SIZE = Window(0, 0, 100, 100), Window(0, 60, 100, 160), (100, 160)


def two(
    left: tuple[int, int, int, int],
    right: tuple[int, int, int, int],
    scores: tuple[float, float],
    labels: tuple[int, int] = (1, 1),
) -> Merged:
    """A rectangle seen in each of two tiles that share columns 60 to 100; boxes of the image."""
    shifted = right[0] - 60, right[1], right[2] - 60, right[3]
    found = [
        *in_image(box_found(LEFT, labels[0], left, scores[0]), 0, LEFT, SIZE),
        *in_image(box_found(RIGHT, labels[1], shifted, scores[1]), 1, RIGHT, SIZE),
    ]
    return merge(found, [LEFT, RIGHT], SIZE)


@pytest.mark.parametrize(
    ("left", "right", "scores", "objects", "counts"),
    [
        # Cut in both: joined, with the higher score.
        ((20, 20, 100, 40), (60, 20, 140, 40), (0.6, 0.8), [(20, 20, 140, 40, 0.8)], (1, 0, 0)),
        # Their masks differ by less than half in the strip: joined.
        ((20, 20, 100, 40), (60, 25, 140, 45), (0.6, 0.8), [(20, 20, 140, 45, 0.8)], (1, 0, 0)),
        # By exactly half, too.
        ((20, 20, 100, 40), (60, 20, 140, 30), (0.6, 0.8), [(20, 20, 140, 40, 0.8)], (1, 0, 0)),
        # By more: two objects, each cut.
        (
            (20, 20, 100, 40),
            (60, 30, 140, 50),
            (0.6, 0.8),
            [(60, 30, 140, 50, 0.8), (20, 20, 100, 40, 0.6)],
            (0, 0, 2),
        ),
        # Whole in one, cut in the other: the whole one, with the higher score.
        ((70, 20, 100, 40), (70, 20, 130, 42), (0.9, 0.5), [(70, 20, 130, 42, 0.9)], (0, 1, 0)),
        # It reaches further than the one that seems whole: joined to it.
        ((20, 20, 98, 40), (66, 20, 90, 40), (0.9, 0.5), [(20, 20, 98, 40, 0.9)], (1, 0, 0)),
        # Half of it is covered: it is not joined.
        ((52, 20, 100, 40), (66, 20, 90, 40), (0.9, 0.5), [(66, 20, 90, 40, 0.9)], (0, 1, 0)),
        # Whole in both: the better one.
        ((65, 20, 90, 40), (66, 20, 91, 40), (0.9, 0.8), [(65, 20, 90, 40, 0.9)], (0, 1, 0)),
        # Cut, without a partner: kept.
        (
            (20, 20, 100, 40),
            (90, 60, 120, 80),
            (0.9, 0.8),
            [(20, 20, 100, 40, 0.9), (90, 60, 120, 80, 0.8)],
            (0, 0, 1),
        ),
        # Cut, and a part of a better one: dropped.
        ((80, 20, 100, 30), (70, 10, 130, 42), (0.4, 0.5), [(70, 10, 130, 42, 0.5)], (0, 1, 0)),
        # Or half a part of it.
        ((80, 20, 100, 30), (70, 25, 130, 57), (0.4, 0.5), [(70, 25, 130, 57, 0.5)], (0, 1, 0)),
        # But a worse one, which covers more, takes nothing away.
        (
            (80, 20, 100, 30),
            (70, 10, 130, 42),
            (0.9, 0.1),
            [(80, 20, 100, 30, 0.9), (70, 10, 130, 42, 0.1)],
            (0, 0, 1),
        ),
    ],
)
def test_the_rule(
    left: tuple[int, int, int, int],
    right: tuple[int, int, int, int],
    scores: tuple[float, float],
    objects: list[tuple[float, ...]],
    counts: tuple[int, int, int],
) -> None:
    merged = two(left, right, scores)
    found = [(*item.box.tolist(), pytest.approx(item.score)) for item in merged.objects]
    assert found == objects
    assert (merged.joined, merged.repeated, merged.cut) == counts


@pytest.mark.parametrize("scores", [(0.9, 0.5), (0.5, 0.9)])
@pytest.mark.parametrize("empty", [(True, False), (False, True), (True, True)])
def test_an_object_whose_mask_is_empty_is_seen_once(
    scores: tuple[float, float], empty: tuple[bool, bool]
) -> None:
    """Its box says where it is; a mask with pixels is kept."""
    found, size = [], (100, 180)
    for number, place in enumerate((LEFT, RIGHT)):
        box = (70 - place.x1, 20, 95 - place.x1, 40)
        one = box_found(place, 1, box, scores[number])
        if empty[number]:
            one = replace(one, masks=tuple(encoded([np.zeros(place.size, bool)])))
        found += in_image(one, number, place, size)
    # A third tile cuts it.
    third = Window(0, 80, 100, 180)
    cut = replace(
        box_found(third, 1, (0, 20, 15, 40), 0.3),
        masks=tuple(encoded([np.zeros(third.size, bool)])) if all(empty) else None,
    )
    merged = merge([*found, *in_image(cut, 2, third, size)], [LEFT, RIGHT, third], size)
    [item] = merged.objects
    assert item.box.tolist() == [70, 20, 95, 40]
    assert item.score == pytest.approx(0.9)
    assert coco_mask.area(item.mask) == (0 if all(empty) else 25 * 20)
    assert merged.repeated == 2


@pytest.mark.parametrize("scores", [(0.9, 0.5), (0.5, 0.9)])
def test_a_cut_mask_is_better_than_an_empty_whole_one(scores: tuple[float, float]) -> None:
    left = replace(
        box_found(LEFT, 1, (30, 20, 95, 40), scores[0]),
        masks=tuple(encoded([np.zeros(LEFT.size, bool)])),
    )
    right = box_found(RIGHT, 1, (0, 20, 35, 40), scores[1])
    found = [*in_image(left, 0, LEFT, SIZE), *in_image(right, 1, RIGHT, SIZE)]
    assert [item.cut for item in found] == [False, True]
    [item] = merge(found, [LEFT, RIGHT], SIZE).objects
    assert coco_mask.area(item.mask) == 35 * 20
    assert item.score == pytest.approx(0.9)


def test_classes_are_apart() -> None:
    merged = two((65, 20, 90, 40), (65, 20, 90, 40), (0.9, 0.8), (1, 2))
    assert [item.label for item in merged.objects] == [1, 2]


def test_an_object_has_one_detection_of_a_tile() -> None:
    """Of two that a tile sees, the one that agrees better is joined with the other tile's."""
    found = [
        *in_image(box_found(LEFT, 1, (20, 24, 100, 42), 0.7), 0, LEFT, SIZE),
        *in_image(box_found(LEFT, 1, (20, 20, 100, 40), 0.6), 0, LEFT, SIZE),
        *in_image(box_found(RIGHT, 1, (0, 20, 80, 40), 0.5), 1, RIGHT, SIZE),
    ]
    merged = merge(found, [LEFT, RIGHT], SIZE)
    boxes = [item.box.tolist() for item in merged.objects]
    assert boxes == [[20, 24, 100, 42], [20, 20, 140, 40]]
    assert [item.score for item in merged.objects] == pytest.approx([0.7, 0.6])


@pytest.mark.parametrize("score", [0.7, 0.95])
def test_objects_that_agree_once_they_are_joined_are_one(score: float) -> None:
    """A bar is seen whole in the middle tile. The others see a half of it each, and something above
    and below: too much for either to agree with the bar, not for both together."""
    places = [Window(0, 0, 100, 100), Window(0, 80, 100, 180), Window(0, 40, 100, 140)]
    bar, more = np.zeros((2, 100, 180), bool)
    bar[40:60, 50:130] = True
    more[:80, 80:100] = True
    found = []
    for number, (mask, sure, box) in enumerate(
        (
            (bar | more, 0.9, (50, 0, 100, 80)),
            (bar | more, 0.8, (0, 0, 50, 80)),
            (bar, score, (10, 40, 90, 60)),
        )
    ):
        window = mask[:, places[number].x1 : places[number].x2]
        there = replace(box_found(places[number], 1, box, sure), masks=tuple(encoded([window])))
        found += in_image(there, number, places[number], (100, 180))
    assert [item.cut for item in found] == [True, True, False]
    [item] = merge(found, places, (100, 180)).objects
    np.testing.assert_array_equal(coco_mask.decode(item.mask), bar | more if score < 0.9 else bar)
    assert item.score == pytest.approx(max(score, 0.9))


@pytest.mark.parametrize("gap", [4, 5])
def test_what_is_near_a_border_of_its_tile_is_cut(gap: int) -> None:
    """1 % of 400 pixels, at each side; not at a border of the image."""
    tile = Window(100, 100, 500, 500)
    boxes = [(gap, 90, 200, 200), (90, gap, 200, 200)]
    boxes += [(90, 90, 400 - gap, 200), (90, 90, 200, 400 - gap)]
    for box in boxes:
        [inner] = in_image(box_found(tile, 1, box, 0.5), 0, tile, (600, 600))
        assert inner.cut == (gap == 4)
        assert inner.box.tolist() == [side + 100 for side in box]
        [outer] = in_image(box_found(tile, 1, box, 0.5), 0, Window(0, 0, 400, 400), (400, 400))
        assert not outer.cut


def test_near_is_a_share_of_the_side_that_ends_there() -> None:
    """4 of 400 pixels of width, and of 200 of height the least, 2."""
    tile = Window(100, 100, 300, 500)
    for box, cut in (
        ((4, 90, 150, 150), True),
        ((90, 4, 150, 150), False),
        ((90, 2, 150, 150), True),
        ((90, 90, 396, 150), True),
        ((90, 90, 150, 196), False),
    ):
        [item] = in_image(box_found(tile, 1, box, 0.5), 0, tile, (600, 600))
        assert item.cut == cut, box


def test_a_box_without_a_mask_is_its_pixels_at_least_one() -> None:
    boxes = np.array([[3, 4, 9, 6], [3.1, 5.2, 9, 5.4], [4.9, 5, 5.1, 8], [99.8, 99.8, 100, 100]])
    found = replace(
        box_found(LEFT, 1, (0, 0, 9, 9), 0.5),
        boxes=boxes,
        labels=np.ones(4, np.int32),
        scores=np.full(4, 0.5, np.float32),
        masks=None,
    )
    masks = [coco_mask.decode(item.mask) for item in in_image(found, 0, LEFT, (100, 100))]
    expected = np.s_[4:6, 3:9], np.s_[5:6, 3:9], np.s_[5:8, 5:6], np.s_[99:, 99:]
    for mask, place in zip(masks, expected, strict=True):
        assert mask[place].all()
        assert mask.sum() == mask[place].size


def test_the_least_score_is_kept() -> None:
    merged = two((20, 20, 40, 40), (110, 20, 140, 40), (0.5, 0.25))
    for least, count in ((0.25, 2), (0.5, 1), (0.75, 0)):
        found = detections(merged.objects, SIZE, CATEGORIES, min_score=least)
        assert len(found.scores) == count


def test_nothing_is_merged_to_nothing() -> None:
    merged = merge([], [LEFT, RIGHT], SIZE)
    assert merged.objects == ()
    assert detections(merged.objects, SIZE, CATEGORIES).boxes.shape == (0, 4)
