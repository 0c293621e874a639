"""Views of an image are merged as NumPy merges them.

At a scale of 0.8 the canvas, and so the programs, are those of 1.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import mrcnn_jax
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.inference.test_time import MergedViews, View, scaled
from mrcnn_jax.pixels.geometry import depth_map
from mrcnn_jax.structures import Instances
from tests.inference.frames import WIDTH, read

NMS_IOU = 0.5  # of the kept run's box head, which keeps 8 boxes


def iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / (float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared)


def mirrored(boxes: np.ndarray) -> np.ndarray:
    return np.array([[WIDTH - x2, y1, WIDTH - x1, y2] for x1, y1, x2, y2 in boxes])


def test_boxes_of_all_views_go_through_one_per_class_nms(
    model: mrcnn_jax.Model, folder: Path
) -> None:
    image = read(folder / "0.png")
    seen: list[tuple[float, int, np.ndarray]] = []
    for scale in (1.0, 0.8):
        plain, turned = model.predict_many([image, image[:, ::-1]], scales=(scale,))
        for detections, boxes in ((plain, plain.boxes), (turned, mirrored(turned.boxes))):
            seen += zip(detections.scores.tolist(), detections.labels.tolist(), boxes, strict=True)
    expected: list[tuple[float, int, np.ndarray]] = []
    for score, label, box in sorted(seen, key=lambda one: -one[0]):
        if not any(label == other and iou(box, kept) > NMS_IOU for _, other, kept in expected):
            expected.append((score, label, box))
    merged = model.predict(image, flip=True, scales=(1.0, 0.8))
    assert len(merged.scores) == min(8, len(expected)) > 4
    for found, (score, label, box) in zip(
        zip(merged.scores, merged.labels, merged.boxes, strict=True), expected, strict=False
    ):
        assert found[:2] == (pytest.approx(score, abs=1e-6), label)
        np.testing.assert_allclose(found[2], box, atol=1e-3)


def test_views_of_a_mirrored_image_are_the_same_mirrored(
    model: mrcnn_jax.Model, folder: Path
) -> None:
    """Holds for masks only if each view's are turned back, and count the same."""
    image = read(folder / "0.png")[:90]
    both = [image, image[:, ::-1]]
    ours, theirs = model.predict_many(both, flip=True, scales=(1.0, 0.8))
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    np.testing.assert_allclose(ours.boxes, mirrored(theirs.boxes), atol=1e-3)
    turned = theirs.masks[:, :, ::-1]
    both, either = ((a.sum((1, 2))) for a in (ours.masks & turned, ours.masks | turned))
    assert (either > 0).sum() > 5
    assert (both[either > 0] > 0.99 * either[either > 0]).all()
    plain = model.predict(image)
    assert plain.boxes.shape != ours.boxes.shape or np.abs(plain.boxes - ours.boxes).max() > 0.1


def test_a_view_scales_and_mirrors_boxes() -> None:
    """By hand: x is halved on the way to the image and then mirrored in 100 pixels, y doubled."""
    view = View({}, None, np.array([0.5, 2.0], np.float32), 100)
    box = np.array([[8.0, 2.0, 20.0, 3.0]], np.float32)
    there = np.array([[90.0, 4.0, 96.0, 6.0]], np.float32)
    np.testing.assert_allclose(view.to_image(box), there)
    np.testing.assert_allclose(view.to_canvas(there), box)


def test_a_view_twice_changes_nothing(model: mrcnn_jax.Model, folder: Path) -> None:
    """Boxes are no more, and masks are a mean."""
    image = read(folder / "2.png")
    once, twice = model.predict(image), model.predict(image, scales=(1.0, 1.0))
    np.testing.assert_allclose(once.scores, twice.scores, atol=1e-6)
    np.testing.assert_allclose(once.boxes, twice.boxes, atol=1e-3)
    assert (once.masks != twice.masks).mean() < 1e-3


@pytest.mark.parametrize("kind", ["dense", "roi"])
def test_masks_ious_and_depth_are_means_over_the_views(kind: str) -> None:
    """Of a network that is made up; what it gives of mirrored views is turned back."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
    masks, ious = rng.random((2, 3, 4, 4)), np.array([[0.5, 1.5, -0.2], [0.9, 0.5, 0.4]])
    seen = Instances(
        boxes=np.array([[1, 1, 9, 7]] * 3, np.float32),
        labels=np.array([1, 2, 1], np.int32),
        scores=np.array([0.9, 0.8, 0.7], np.float32),
        valid=np.ones(3, bool),
    )
    of_boxes, maps = rng.uniform(1, 9, (2, 3, 4, 4)), rng.uniform(1, 9, (2, 8, 8))
    batched = jax.tree.map(lambda field: field[None], seen)
    told: dict[str, Any] = {}

    def in_image(found: Instances, *_: Any, depth: Any, **__: Any) -> None:
        told.update(masks=found.masks, scores=found.mask_scores, depth=depth)

    views = object.__new__(MergedViews)
    data = DataConfig(short_side=8, long_side=12, canvases=((32, 32),))
    run = SimpleNamespace(config=SimpleNamespace(data=data))
    views._predictor = SimpleNamespace(run=run, variables=None, in_image=in_image)
    answers, later = iter(maps), zip(masks, ious, of_boxes, strict=True)
    views._detect = lambda *_: ({}, next(answers) if kind == "dense" else None, batched)
    views._merge = lambda found: jax.tree.map(lambda field: field[:3], found)

    def of_view(*_: Any) -> tuple[Any, Any, Any]:
        mask, iou, depth = next(later)
        return mask, iou, depth if kind == "roi" else None

    views._masks = of_view
    views.detections(image, flip=True, scales=(1.0,))
    mean = (masks[0] + masks[1][..., ::-1]) / 2
    np.testing.assert_allclose(told["masks"], mean)
    np.testing.assert_allclose(told["scores"], seen.scores * [0.7, 0.75, 0.2])
    if kind == "roi":
        np.testing.assert_allclose(told["depth"], (of_boxes[0] + of_boxes[1][..., ::-1]) / 2)
    else:
        whole = [depth_map(one.astype(np.float32), np.ones(2), (8, 12), stride=4) for one in maps]
        np.testing.assert_allclose(told["depth"], (whole[0] + whole[1][:, ::-1]) / 2)


def test_scaled_canvases_hold_scaled_images() -> None:
    half, larger = scaled(DataConfig(), 0.5), scaled(DataConfig(), 1.3)
    assert (half.short_side, half.long_side, half.canvases) == (400, 544, ((416, 544), (544, 416)))
    assert (larger.short_side, larger.long_side, larger.canvases) == (
        1040,
        1414,
        ((1056, 1440), (1440, 1056)),
    )
