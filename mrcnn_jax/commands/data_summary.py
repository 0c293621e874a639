"""A checked data set in numbers, as needed to choose a recipe."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.caps import Cap, caps
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.evaluation.average_precision import category_names
from mrcnn_jax.output import listed
from mrcnn_jax.pixels.transforms import plan_for

SMALL = 32**2  # px: COCO calls objects of a smaller area small
SIDES = (8, 16, 32, 64, 128, 256, 512)  # px on the canvas: limits of the histogram


def summary(
    dataset: CocoDataset, data: DataConfig, model: ModelConfig | None = None
) -> dict[str, Any]:
    """The report, and counts of objects by class and size and of images by size and canvas.

    Args:
        dataset: a checked data set.
        data: canvases and limits.
        model: more limits; None: they are not known.

    Returns:
        JSON values only. Sides are in canvas pixels, the square root of the box's area.
    """
    plans = [plan_for(image.height, image.width, data) for image in dataset.images]
    objects = [
        (record, plan)
        for image, plan in zip(dataset.images, plans, strict=True)
        for record in image.objects
    ]
    counts = [len(image.objects) for image in dataset.images]
    by_label = Counter(record.label for record, _ in objects)
    by_size = Counter(f"{image.height} x {image.width}" for image in dataset.images)
    areas = np.array([record.area for record, _ in objects])
    magnified = np.array([plan.scale[0] * plan.scale[1] for _, plan in objects])
    boxes = np.array([record.box for record, _ in objects]).reshape(-1, 4)
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * magnified)
    histogram = np.bincount(np.searchsorted(SIDES, sides, side="right"), minlength=len(SIDES) + 1)
    between = (f"{low} to {high}" for low, high in itertools.pairwise(SIDES))
    names = [f"under {SIDES[0]}", *between, f"from {SIDES[-1]}"]
    used = Counter(plan.canvas for plan in plans)

    def share(sizes: Float[np.ndarray, " n"]) -> float:
        return float((sizes < SMALL).mean()) if objects else 0.0

    names_of_classes = category_names([asdict(c) for c in dataset.categories]).values()
    return {
        **dataset.report.to_dict(),
        "objects_by_class": {
            name: by_label[label] for label, name in enumerate(names_of_classes, 1)
        },
        "objects_by_canvas_side": dict(zip(names, histogram.tolist(), strict=True)),
        "small_objects_share": share(areas),
        "small_objects_share_on_canvas": share(areas * magnified),
        "objects_without_mask": sum(record.rle is None for record, _ in objects),
        "max_objects_per_image": max(counts),
        "images_by_size": dict(by_size.most_common()),
        "images_by_canvas": {
            f"{h} x {w}": used[i] for i, (h, w) in enumerate(data.canvases) if used[i]
        },
        "images_without_objects": counts.count(0),
        "depth": None if dataset.depth is None else asdict(dataset.depth),
        "caps": [asdict(cap) for cap in caps(dataset, data, model)],
    }


def summary_lines(dataset: CocoDataset, found: dict[str, Any]) -> list[str]:
    """`summary` for people."""

    def counted(name: str, limit: int = 8) -> str:
        return listed([f"{key}: {count}" for key, count in found[name].items()], limit)

    return [
        *dataset.report.lines(),
        f"objects per class: {counted('objects_by_class', 100)}",
        "objects by size (square root of the box's area on the canvas, px): "
        f"{counted('objects_by_canvas_side')}",
        "small objects (area under 32 x 32 px): "
        f"{found['small_objects_share']:.1%} in the images, "
        f"{found['small_objects_share_on_canvas']:.1%} on the canvas",
        f"objects without a mask: {found['objects_without_mask']}",
        f"most objects in an image: {found['max_objects_per_image']}",
        f"images by height x width: {counted('images_by_size')}",
        f"images by canvas: {counted('images_by_canvas')}",
        f"images without objects: {found['images_without_objects']}",
        *([] if dataset.depth is None else [dataset.depth.line(len(dataset.images))]),
        *(Cap(**cap).line() for cap in found["caps"]),
    ]
