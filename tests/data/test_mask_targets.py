"""What the model is trained on, against the full masks: the price of carrying masks as crops,
measured on real objects."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.coco import read_coco
from mrcnn_jax.data.transforms import mask_crop
from mrcnn_jax.ops.masks import crop_targets

SIZE = 28


def _from_full_mask(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The mask inside the box, resized bilinearly to 28 x 28 and cut at .5."""

    def down(rows: np.ndarray, start: float, stop: float) -> np.ndarray:
        position = np.clip(
            start + (np.arange(SIZE) + 0.5) / SIZE * (stop - start) - 0.5, 0, len(rows) - 1
        )
        first = np.floor(position).astype(int)
        second = np.minimum(first + 1, len(rows) - 1)
        weight = (position - first)[:, None]
        return (1 - weight) * rows[first] + weight * rows[second]

    x1, y1, x2, y2 = box.astype(np.float64)
    return down(down(mask, y1, y2).T, x1, x2).T >= 0.5


@pytest.fixture(scope="module")
def objects(data_folder: Path) -> list[tuple[np.ndarray, tuple[float, ...], np.ndarray]]:
    """Full mask, box and crop of the training objects of coco300."""
    root = data_folder / "coco300"
    dataset = read_coco(
        root / "annotations" / "instances_train.json", root / "images", DataConfig()
    )
    records = [
        record
        for image in dataset.images
        for record in image.objects
        if record.rle and not record.iscrowd
    ]
    return [
        (rle_ops.decode(record.rle), record.box, mask_crop(record.rle, record.box, 112))
        for record in records
    ]


@pytest.mark.data
@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.2])
def test_targets_from_crops_are_those_from_full_masks(objects: list[tuple], jitter: float) -> None:
    masks, truth, crops = zip(*objects, strict=True)
    truth = np.array(truth, np.float32)
    sides = np.tile(truth[:, 2:] - truth[:, :2], 2)
    boxes = truth + (jitter * np.random.default_rng(0).uniform(-1, 1, truth.shape) * sides).astype(
        np.float32
    )
    boxes = np.clip(boxes, 0, np.array([mask.shape[::-1] * 2 for mask in masks], np.float32))
    rows = np.arange(len(masks), dtype=np.int32)
    cut = (
        np.asarray(
            jax.jit(crop_targets, static_argnames="size")(
                np.stack(crops), truth, rows, boxes, size=SIZE
            )
        )
        > 0
    )
    full = np.stack([_from_full_mask(mask, box) for mask, box in zip(masks, boxes, strict=True)])
    union = (cut | full).sum((1, 2))
    iou = np.where(union > 0, (cut & full).sum((1, 2)) / np.maximum(union, 1), 1)
    bias = cut.sum() / full.sum() - 1
    print(
        f"\njitter {jitter}: {len(masks)} objects, mean IoU {iou.mean():.4f}, smallest {iou.min():.3f}, area {bias:+.2%}"
    )
    assert len(masks) > 1400
    assert iou.mean() >= 0.95
    assert iou.min() > 0.8
    assert abs(bias) <= 0.01
