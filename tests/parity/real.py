"""Photographs of coco_mini and the ImageNet weights of the data folder."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.pixels.rle import segmentation_rle

IMAGES = (7574, 311303, 109313)  # 480 x 640, 427 x 640, 640 x 480 (height x width)


def image(folder: Path, number: int, short_side: int) -> np.ndarray:
    """uint8 RGB, resized to a short side."""
    pixels = cv2.imread(
        str(folder / "coco_mini" / "images" / f"{number:012d}.jpg"),
        cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
    )
    scale = short_side / min(pixels.shape[:2])
    size = [round(side * scale) for side in pixels.shape[1::-1]]
    return cv2.resize(pixels, size)


def scene(
    folder: Path, number: int, short_side: int, smallest: float = 4.0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns an image and its objects of at least `smallest` px, as `seeded.seeded_scene` does."""
    pixels = image(folder, number, short_side)
    height, width = pixels.shape[:2]
    found = json.loads((folder / "coco_mini" / "annotations" / "val_full80.json").read_text())
    original = next(
        (entry["height"], entry["width"]) for entry in found["images"] if entry["id"] == number
    )
    scale = np.array([width / original[1], height / original[0]])
    boxes, labels, masks = [], [], []
    for annotation in found["annotations"]:
        corner, side = np.array(annotation["bbox"]).reshape(2, 2) * scale
        if annotation["image_id"] != number or annotation["iscrowd"] or side.min() < smallest:
            continue
        mask = rle_ops.decode(segmentation_rle(annotation["segmentation"], original))
        boxes.append([*corner, *(corner + side)])
        labels.append(annotation["category_id"])
        masks.append(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST))
    return pixels, {
        "boxes": np.array(boxes, np.float32),
        "labels": np.array(labels, np.int64),
        "masks": np.stack(masks),
    }


def resnet50(folder: Path) -> dict[str, np.ndarray]:
    """Tensors by the names of torchvision's detectors."""
    with np.load(folder / "weights" / "pqf_resnet50_large.npz") as tensors:
        return {
            f"backbone.body.{name}": tensors[name]
            for name in tensors.files
            if not name.startswith("fc.")
        }
