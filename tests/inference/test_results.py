"""Detections on canvases -> COCO results in original pixels."""

from __future__ import annotations

import json

import numpy as np
from pycocotools import mask as coco_mask

from mrcnn_jax.inference.results import coco_results
from mrcnn_jax.pixels.rle import PasteStyle, paste_rle
from mrcnn_jax.structures import Instances

SCALES = np.array([[2.0, 2.5], [1.0, 1.0], [np.nan, np.nan]], np.float32)
SIZES = np.array([[20, 30], [40, 10], [-1, -1]], np.int32)


def _detections(masks: bool = True) -> Instances:
    boxes = np.full((3, 2, 4), np.nan, np.float32)
    boxes[0, 0] = (10, 8, 50, 24)  # original: x 4..20, y 4..12
    boxes[0, 1] = (-5, 30, 80, 50)  # original: x -2..32, y 15..25; the image ends at 30 x 20
    boxes[1, 1] = (1, 2, 5, 12)
    return Instances(
        boxes=boxes,
        valid=np.array([[True, True], [False, True], [True, True]]),
        labels=np.array([[1, 3], [99, 2], [-7, 0]], np.int32),
        scores=np.array([[0.75, 0.5], [np.nan, 0.25], [9, 9]], np.float32),
        masks=np.ones((3, 2, 28, 28), np.float32) if masks else None,
    )


def _results(masks: bool = True, paste: PasteStyle = "exact") -> list[dict]:
    return coco_results(
        _detections(masks),
        scales=SCALES,
        original_sizes=SIZES,
        image_ids=[101, 0, -1],
        categories=[(7, "a"), (90, "b"), (11, "c")],
        images_valid=np.array([True, True, False]),
        paste=paste,
    )


def test_ids_boxes_and_scores_are_those_of_the_original_image() -> None:
    results = _results(masks=False)
    assert [(r["image_id"], r["category_id"], r["score"]) for r in results] == [
        (101, 7, 0.75),
        (101, 11, 0.5),
        (0, 90, 0.25),
    ]
    np.testing.assert_allclose(
        [r["bbox"] for r in results], [[4, 4, 16, 8], [0, 15, 30, 5], [1, 2, 4, 10]], atol=1e-6
    )
    assert all("segmentation" not in r for r in results)


def test_masks_have_the_size_of_the_original_image() -> None:
    results = _results()
    masks = [coco_mask.decode(r["segmentation"]) for r in results]
    assert [m.shape for m in masks] == [(20, 30), (20, 30), (40, 10)]
    expected = np.zeros((20, 30), np.uint8)
    expected[4:12, 4:20] = 1
    np.testing.assert_array_equal(masks[0], expected)


def test_masks_are_pasted_as_the_config_says() -> None:
    exact, other = _results(), _results(paste="torchvision")
    ones = np.ones((28, 28), np.float32)
    assert (
        other[0]["segmentation"]
        == paste_rle(ones, np.array([4, 4, 20, 12]), (20, 30), "torchvision")
        != exact[0]["segmentation"]
    )
    assert [result["bbox"] for result in other] == [result["bbox"] for result in exact]


def test_a_clipped_box_does_not_move_its_mask() -> None:
    detections = _detections()
    mask = np.linspace(0, 1, 28, dtype=np.float32)[None, :].repeat(
        28, 0
    )  # half of it is the object: right of the box's middle
    detections.masks[0, 1] = mask
    result = coco_results(
        detections,
        scales=SCALES,
        original_sizes=SIZES,
        image_ids=[1, 2, 3],
        categories=[(1, "a"), (2, "b"), (3, "c")],
        images_valid=np.array([1, 0, 0], bool),
        paste="exact",
    )[1]
    assert result["segmentation"] == paste_rle(mask, np.array([-2, 15, 32, 25]), (20, 30))
    assert not coco_mask.decode(result["segmentation"])[:, :14].any()  # the middle of -2..32 is 15


def test_results_go_through_json() -> None:
    results = _results()
    assert json.loads(json.dumps(results)) == results


def test_no_valid_image_gives_no_result() -> None:
    none = coco_results(
        _detections(),
        scales=SCALES,
        original_sizes=SIZES,
        image_ids=[1, 2, 3],
        categories=[(1, "a"), (2, "b"), (3, "c")],
        images_valid=np.zeros(3, bool),
        paste="exact",
    )
    assert none == []
