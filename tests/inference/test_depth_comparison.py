"""Depth of pixels and objects beside the true one, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mrcnn_jax.data.records import ImageRecord, ObjectRecord
from mrcnn_jax.evaluation.average_precision import judge
from mrcnn_jax.inference.depth_comparison import DepthComparison
from mrcnn_jax.pixels.rle import encoded

SIZE = (20, 30)
LEFT, RIGHT = np.s_[4:14, 2:12], np.s_[4:14, 16:26]


def rle(place: tuple[slice, slice]) -> dict:
    mask = np.zeros(SIZE, bool)
    mask[place] = True
    return encoded([mask])[0]


def record(number: int, place: tuple[slice, slice], iscrowd: bool = False) -> ObjectRecord:
    rows, columns = place
    box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
    return ObjectRecord(number, 1, box, rle(place), iscrowd, 100.0)


def result(image: int, place: tuple[slice, slice], depth: float | None) -> dict:
    rows, columns = place
    box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
    found = {"image_id": image, "category_id": 1, "bbox": box, "score": 0.9}
    return found | {"segmentation": rle(place), "depth": depth}


def test_pixels_objects_and_objects_under_true_masks() -> None:
    """Image 3 has no true depth, image 5 two objects, one of them a crowd, of which one is found by
    a mask that reaches beyond it."""
    true = np.full(SIZE, 2.0, np.float32)
    true[LEFT], true[0] = 1.0, 0
    predicted = np.full(SIZE, 2.2, np.float32)
    predicted[LEFT] = 1.3
    images = [
        ImageRecord(3, "a", *SIZE, (record(1, LEFT),)),
        ImageRecord(5, "b", *SIZE, (record(2, RIGHT, iscrowd=True), record(3, LEFT))),
    ]
    results = [result(3, LEFT, 9.0), result(5, np.s_[4:14, 2:13], 1.4), result(5, RIGHT, 7.0)]
    truth = {
        "images": [{"id": i.id, "height": SIZE[0], "width": SIZE[1]} for i in images],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                "id": o.annotation_id,
                "image_id": i.id,
                "category_id": 1,
                "bbox": [o.box[0], o.box[1], 10.0, 10.0],
                "area": 100.0,
                "iscrowd": int(o.iscrowd),
                "segmentation": o.rle,
            }
            for i in images
            for o in i.objects
        ],
    }
    masks = judge(truth, results, iou_types=("segm",))["segm"]

    def figures(*parts: DepthComparison) -> dict[str, float]:
        whole = DepthComparison()
        for part in parts:
            whole.merge(part.packed())
        return whole.figures(list(enumerate(images)), results, masks)

    first, second = DepthComparison(), DepthComparison()
    first.add(0, images[0], predicted, None)
    assert figures(first) == {}
    second.add(1, images[1], predicted, true)
    found = figures(first, second)
    far = 20 * 30 - 30 - 100
    assert found["depth/AbsRel"] == pytest.approx((100 * 0.3 + far * 0.1) / (far + 100), rel=1e-5)
    assert found["depth/images"] == 1
    assert found["depth/objects/count"] == found["depth/true_masks/count"] == 1
    assert found["depth/objects/AbsRel"] == pytest.approx(0.4)  # as the detection says
    assert found["depth/true_masks/AbsRel"] == pytest.approx(0.3, rel=1e-5)
    # An object that was not found counts under its true mask alone.
    none = judge(truth, [], iou_types=("segm",))["segm"]
    left = second.figures(list(enumerate(images)), [], none)
    assert "depth/objects/count" not in left
    assert left["depth/true_masks/count"] == 1
