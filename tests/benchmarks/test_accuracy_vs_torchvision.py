"""benchmarks/accuracy_vs_torchvision.py without torch (tests/parity has the rest)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
import state_dicts
from accuracy_vs_torchvision import mean_losses, summary, window_means
from flax.traverse_util import flatten_dict
from joint_run import subset, whole_epochs
from peer_training import full_masks, remaining, results_of, to_torchvision
from pycocotools import mask as coco_mask

from mrcnn_jax.evaluation.average_precision import coco_figures, match_results
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.weights.mapping import assign, fill


def test_weights_go_to_torchvision_and_come_back() -> None:
    family = state_dicts.family("maskrcnn_resnet50_fpn")
    assert family.model is not None
    model = MaskRCNN(family.model)
    shapes = {
        name: shape
        for name, shape in state_dicts.recorded(family.name).items()
        if not name.endswith("num_batches_tracked")
    }
    tensors = state_dicts.tensors(shapes)
    template = jax.eval_shape(
        lambda batch: model.init(jax.random.key(0), batch), example_batch((64, 64))
    )
    ours = fill(template, assign(shapes, family.rules, family.left_out, "file"), tensors, "file")
    back = to_torchvision(flatten_dict(ours, sep="/"), shapes)
    for name, rows in {"box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}.items():
        for kind in ("weight", "bias"):
            tensors[f"roi_heads.{name}.{kind}"][:rows] = 0  # of the background
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_results_are_found_where_the_objects_are() -> None:
    """COCO's AP is 1 for results made of the ground truth, which is written as polygons."""
    boxes = np.array([[2, 3, 10, 8], [20, 5, 31, 39]], np.float32)
    ground_truth = {
        "images": [{"id": 7, "height": 40, "width": 50}],
        "categories": [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 7,
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            }
            for i, ((x1, y1, x2, y2), category) in enumerate(
                zip(boxes.tolist(), (90, 3), strict=True)
            )
        ],
    }
    masks = np.zeros((2, 40, 50), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    results = results_of(
        7,
        [3, 90],
        boxes=boxes,
        labels=np.array([2, 1]),
        scores=np.array([0.9, 0.8], np.float32),
        masks=masks,
    )
    metrics = coco_figures(match_results(ground_truth, results))
    assert [metrics["bbox/AP"], metrics["segm/AP"]] == pytest.approx([1, 1])
    for wrong in (np.array([1, 2]), np.array([1, 1])):
        results = results_of(7, [3, 90], boxes, wrong, np.ones(2, np.float32), masks)
        assert coco_figures(match_results(ground_truth, results))["segm/AP"] < 0.6


def test_masks_are_of_the_objects_without_crowds() -> None:
    masks = np.zeros((3, 6, 9), np.uint8)
    for i, mask in enumerate(masks):
        mask[i : i + 2, 3 * i : 3 * i + 1 + i] = 1
    counts = [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in masks]
    found = full_masks({"objects": {"counts": counts, "iscrowd": [False, True, False]}}, (6, 9))
    np.testing.assert_array_equal(found, masks[[0, 2]])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (1, (1, 2, 1)),
        (3, (1, 5, 3)),
        (4, (1, 7, 4)),
        (5, (1, 8, 5)),
        (12, (2, 8, 10)),
        (13, (3, 8, 15)),
    ],
)
def test_steps_are_whole_epochs(asked: int, expected: tuple[int, int, int]) -> None:
    """Batches of 2: 5 images on one canvas and 3 on another make 3 + 2 batches."""
    assert whole_epochs([0, 0, 0, 0, 0, 1, 1, 1], 2, asked) == expected


def test_subset_of_a_file() -> None:
    crowd, plain, elsewhere = (
        {"image_id": 1, "iscrowd": 1},
        {"image_id": 1},
        {"image_id": 2, "iscrowd": 0},
    )
    content = {
        "categories": ["a"],
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [crowd, plain, elsewhere],
    }
    assert subset(content, {1, 2}, crowds=True) == content
    assert subset(content, {1}, crowds=False) == {
        "categories": ["a"],
        "images": [{"id": 1}],
        "annotations": [plain],
    }


def test_a_run_goes_on_with_the_batches_that_are_left() -> None:
    epochs = ["abc", "def"]
    for step in range(7):
        left = remaining(epochs, step)
        assert "".join(batches for _, batches in left) == "abcdef"[step:]
        assert all(batches and epochs[epoch - 1].endswith(batches) for epoch, batches in left)


def test_losses_are_means_of_the_first_step_and_of_whole_windows() -> None:
    names = ("rpn_objectness", "rpn_box", "box_class", "box_box", "mask")
    rows = [
        {"step": step, "split": "train"}
        | {f"loss/{name}": float(step * 10**i) for i, name in enumerate(names)}
        for step in range(1, 8)
    ]
    rows.insert(3, {"step": 3, "split": "val"} | {f"loss/{name}": 1e9 for name in names})
    means = window_means(rows, 3)
    assert [(step, at["rpn_objectness"], at["mask"]) for step, at in means.items()] == [
        (1, 1, 1e4),
        (3, 2, 2e4),
        (6, 5, 5e4),
    ]
    assert window_means([], 3) == {}


def test_sides_that_have_not_begun_have_no_means(tmp_path: Path) -> None:
    arguments = Namespace(workdir=tmp_path, every=3)
    assert mean_losses(arguments, 0, ("torchvision", "ours")) == {}


def test_differences_are_ours_less_torchvisions() -> None:
    names = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")
    figures = {
        side: {seed: dict.fromkeys(names, value + seed / 10) for seed in (0, 2)}
        for side, value in (("torchvision", 0.2), ("ours", 0.3))
    }
    row = summary(figures)["segm/AP"]
    assert row["difference"] == [0.1, 0.1]
    assert row["ours"] == [0.3, 0.5]
    assert row["torchvision_mean"] == 0.3
    assert row["ours_spread"] == pytest.approx(np.std([0.3, 0.5], ddof=1), abs=1e-5)
    assert "difference" not in summary({"ours": figures["ours"]})["segm/AP"]
